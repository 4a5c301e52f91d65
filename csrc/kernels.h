// What the Python side passes to the kernels: one struct an operation, the same for a GPU and a CPU.
// Shapes: B sequences, G KV heads, H query heads, S slots, T tokens of a block, L tokens of the sequence, D head size.
#pragma once
#include <cstdint>

enum ElementType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Attention of one new token over the slots of a block pool. `ops.py` has the same struct, field by field.
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

// Blocks from the slabs of a host store to a block pool (GPU) or to a staging buffer (CPU).
struct Gather {
    const int64_t *slab;   // addresses of the slabs, each [R, slab_blocks, 2, T, D]
    const int64_t *row;    // [n]
    const int64_t *block;  // [n]
    const int64_t *slot;   // [n], GPU alone
    void *key;             // GPU: [R, S, T, D]; CPU: the buffer [n, 2, T, D]
    void *value;           // GPU: [R, S, T, D]
    int64_t n, slab_blocks, slots, half_bytes;  // half_bytes: the keys, or the values, of one block
    int64_t workers;                            // GPU: thread blocks; CPU: threads
};

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
