#pragma once
#include "kernels.h"

// What one query makes of every block, by the few-bit keys of a sketch. N blocks, K groups of tokens (room for `capacity`
// of them), J bytes of a group. Channels stand in the order of their importance, but for `query` and `tail`.
struct SketchScores {
    const float *query;       // [B, H, D] times the scaling
    const float *ranked;      // the same, channels in order
    const uint16_t *zero;     // [B, G, capacity, D] fp16
    const uint16_t *scale;    // [B, G, capacity, coded] fp16
    const uint8_t *wide;      // [B, G, capacity, group · wide_bits / 8, wide_channels]; null: there are none
    const uint8_t *narrow;    // [B, G, capacity, group · bits / 8, coded − wide_channels]
    const void *tail;         // [B, G, group, D] exact keys of the last, partial group
    const uint8_t *real;      // [B, L] 0 at padding; null: no padding
    float *peak;              // [B, H, N] largest logit of a block
    float *sum;               // [B, H, N] log-sum-exp of a block's logits
    int64_t batch, kv_heads, heads, head_dim, capacity, group, length, block_size;
    int64_t coded, wide_channels, wide_bits, bits, element, workers;
    double softcap;           // 0: none
};
