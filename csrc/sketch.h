#pragma once
#include "kernels.h"

// The data of a sketch (`KeySketch`): K groups of tokens, `capacity` of them allocated, J bytes per group. Channels are ordered by
// importance, except in `tail`.
struct Sketch {
    uint16_t *zero;           // [B, G, capacity, D] fp16
    uint16_t *scale;          // [B, G, capacity, coded] fp16
    uint8_t *wide;            // [B, G, capacity, group · wide_bits / 8, wide_channels]; null: there are none
    uint8_t *narrow;          // [B, G, capacity, group · bits / 8, coded − wide_channels]
    void *tail;               // [B, G, group, D] exact keys of the last, partial group
    const int64_t *order;     // [B, G, D] channels, most important first
    int64_t batch, kv_heads, head_dim, capacity, group, coded, wide_channels, wide_bits, bits, element;
};

// Scores of every block for one query.
struct SketchScores {
    Sketch sketch;
    const void *query;        // [B, H, D]
    const uint8_t *real;      // [B, length] 0 at padding; null: no padding
    const int64_t *length_B;  // tokens of each sequence; null: length
    float *peak;              // [B, H, N] largest logit of a block
    float *sum;               // [B, H, N] log-sum-exp of a block's logits
    int64_t heads, length, block_size;
    int64_t workers;          // threads of a CPU
    double scaling, softcap;  // softcap 0: none
};

// Quantises keys: `groups` whole groups, or one token, which is added to the tail and may complete its group. GPU only.
struct SketchStore {
    Sketch sketch;
    const void *key;          // [B, G, T, D]
    const int64_t *length_B;  // tokens of each sequence, this one included; null: length
    int64_t of_batch, of_head, of_token;  // strides of `key` in elements
    int64_t first, groups;    // stores groups from `first` on
    int64_t append;           // 1: one token, the last of the sequence
    int64_t length;
};
