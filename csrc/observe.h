#pragma once
#include "kernels.h"

// Updates the time filters' state with score rows: C = 14 channels per block.
struct ObserveRow {
    const float *given;       // [B, G, rows, columns] rows, oldest first; null: one row, computed from the logits below
    const float *peak;        // [B, H, columns] estimated largest logit of each block; null: −inf
    const int64_t *block;     // [B, G, S] block in each slot, −1: takes no part
    const float *slot_peak;   // [B, H, S] exact largest logit of each slot
    const float *total;       // [B, H] log-sum-exp of all logits
    const float *rest;        // [B, H] log-sum-exp of logits not included in `total`; null: it includes all
    const float *fold;        // [C] weight of the new score in each average, then the fall of each peak per step
    const int64_t *length_B;  // tokens of each sequence; null: length
    float *state;             // [B, G, capacity, C]
    float *row;               // [B, G, columns] output: the row; null: not needed
    int64_t batch, kv_heads, heads, slots, columns, capacity, block_size, length, rows;
    int64_t fresh;            // 1: no state yet; the averages start at the first row
    double eps, full_scale;   // scores far below eps count as zero; log(1 + 1/eps)
};
