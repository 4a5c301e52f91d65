#pragma once
#include "kernels.h"

// Rotary embedding of the first `rotated` elements of queries and keys: rotates element i with element i + rotated / 2.
struct Rotary {
    const void *query, *key;     // [B, H, T, D] and [B, G, T, D], a token's elements contiguous
    const void *cosine, *sine;   // [B, T, rotated]
    void *query_out, *key_out;   // contiguous
    int64_t batch, heads, kv_heads, tokens, head_dim, rotated;
    // Strides in elements; 0 for the angles if all sequences share them.
    int64_t query_batch, query_head, query_token, key_batch, key_head, key_token, angle_batch;
    int64_t wide;                // 1: halves, strides and addresses are multiples of 16 bytes
};
