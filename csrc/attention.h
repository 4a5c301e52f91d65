#pragma once
#include "kernels.h"

// Attention of one new token over the slots of a block pool.
struct SparseDecode {
    const void *query;        // [B, H, D]
    const void *key;          // [B, G, S, T, D]
    const void *value;        // [B, G, S, T, D]; null: scores alone
    const int64_t *block;     // [B, G, S] block in each slot, -1: takes no part
    const uint8_t *real;      // [B, length] 0 at padding; null: no padding
    const float *sinks;       // [H] logit of one more column without a value; null: none
    const int64_t *length_B;  // [B] tokens of each sequence, on the device; null: `length`
    const int64_t *padding;   // [B] tokens of left padding of each sequence; null: none
    void *out;                // [B, H, D]; this and what follows but for `peak` and `sum`: null for scores alone
    float *peak;              // [B, H, S] largest logit of a slot
    float *sum;               // [B, H, S] log-sum-exp of a slot's logits
    float *lse;               // [B, H] log-sum-exp of all, the sink included
    float *partial;           // [B, H, splits, D + 4] room for the GPU's partial results
    int32_t *arrived;         // [B, H] zeros, and zeros again afterwards: splits that are done
    int64_t batch, kv_heads, group, slots, tokens, head_dim, length, splits, element;  // H = kv_heads · group
    int64_t window, chunk;    // visible: so many of the last tokens; those of the newest token's chunk; 0: all
    double scaling, softcap;  // logits are softcap · tanh(scaling · q·k / softcap); softcap 0: scaling · q·k
};
