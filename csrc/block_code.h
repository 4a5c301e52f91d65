#pragma once
#include "gather.h"

// A layout of a block's bytes is in block_code.py. A row's part of a coded slab is [slab_blocks, bytes of a block].

// Codes whole blocks of keys and values.
struct Encode {
    const void *key, *value;  // [B, G, N · T, D], numbers of a token adjacent
    uint8_t *code;            // [B, G, N, bytes of a block]
    int64_t kv_heads, blocks, tokens, head_dim;
    int64_t key_sequence, key_head, key_token;        // strides in numbers
    int64_t value_sequence, value_head, value_token;
};

// `Move` from coded slabs.
struct MoveCoded {
    Move move;
    const void *open;       // [R, 2, T, D] the block of each row that isn't complete, as it is
    const int64_t *length;  // [B] tokens of each sequence
    int64_t kv_heads, tokens, head_dim;
};

// `Append` to coded slabs: the token that completes a block codes it, and the pool gets what the codes decode to.
struct AppendCoded {
    Append append;
    void *open;  // [R, 2, T, D]
    int64_t head_dim;
};
