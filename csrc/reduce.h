#pragma once
#include "kernels.h"

// Reduces logits of a prompt's last queries over some keys to blocks, and merges them with those of other keys.
struct ReduceLogits {
    const float *product;    // [B, H, Q, T] query times key
    const uint8_t *real;     // [B, length] 0 at padding; null: no padding
    float *peak;             // [B, H, Q, N] largest logit of a block, so far
    float *sum;              // [B, H, Q, N] log-sum-exp of a block's logits, so far
    int64_t batch, heads, queries, tokens, blocks, length;
    int64_t first_key, first_query;  // numbers of the first key and the first query in the sequence
    int64_t block_size;
    double scaling, softcap;         // softcap 0: none
};
