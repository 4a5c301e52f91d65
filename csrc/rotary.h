#pragma once
#include "kernels.h"

// The rotary embedding of queries and keys, of their first `rotated` elements: element i with element i + rotated / 2.
struct Rotary {
    const void *query, *key;     // [B, H, T, D] and [B, G, T, D], each token's elements one after the other
    const void *cosine, *sine;   // [B, T, rotated]
    void *query_out, *key_out;   // contiguous
    int64_t batch, heads, kv_heads, tokens, head_dim, rotated;
    // Elements from one to the next; of the angles 0 where all sequences have the same.
    int64_t query_batch, query_head, query_token, key_batch, key_head, key_token, angle_batch;
    int64_t wide;                // 1: halves, strides and addresses are multiples of 16 bytes
};
