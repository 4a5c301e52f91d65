#pragma once
#include "kernels.h"

// Attention of one new token over the slots of a block pool.
struct SparseDecode {
    const void *query;     // [B, H, D]
    const void *key;       // [B, G, S, T, D]
    const void *value;     // [B, G, S, T, D]; null: scores alone
    const int64_t *block;  // [B, G, S] block in each slot, -1: takes no part
    const uint8_t *real;   // [B, L] 0 at padding; null: no padding
    const float *sinks;    // [H] logit of one more column without a value; null: none
    void *out;             // [B, H, D]
    float *peak;           // [B, H, S] largest logit of a slot
    float *sum;            // [B, H, S] log-sum-exp of a slot's logits
    float *lse;            // [B, H] log-sum-exp of all, the sink included
    float *partial;        // [B, H, splits, D + 2] room for the GPU's partial results
    int64_t batch, kv_heads, heads, slots, tokens, head_dim, length, splits, element;
    double scaling, softcap;  // logits are softcap · tanh(scaling · q·k / softcap); softcap 0: scaling · q·k
};
