#pragma once
#include "kernels.h"

// A step's row of block scores, folded into the state of the time filters: C = 14 channels a block.
struct ObserveRow {
    const float *given;       // [B, G, rows, columns] rows, oldest first; null: one, made of the logits that follow
    const float *peak;        // [B, H, columns] estimated largest logit of each block; null: −inf
    const int64_t *block;     // [B, G, S] block in each slot, −1: takes no part
    const float *slot_peak;   // [B, H, S] exact largest logit of each slot
    const float *total;       // [B, H] log-sum-exp of all logits
    const float *rest;        // [B, H] log-sum-exp of those that `total` lacks; null: it lacks none
    const float *fold;        // [C] weight of the new score in each average, then how far each peak falls
    const int64_t *length_B;  // tokens of each sequence; null: length
    float *state;             // [B, G, capacity, C]
    float *row;               // [B, G, columns] takes the row; null: nobody wants it
    int64_t batch, kv_heads, heads, slots, columns, capacity, block_size, length, rows;
    int64_t fresh;            // 1: there is no state yet; the first row has held forever before
    double eps, full_scale;   // scores far below eps count as zero; log(1 + 1/eps)
};
