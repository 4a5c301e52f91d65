#pragma once
#include "kernels.h"

// Blocks from the slabs of a host store to a buffer, on a CPU.
struct Gather {
    const int64_t *slab;   // addresses of the slabs, each [R, slab_blocks, 2, T, D]
    const int64_t *row;    // [n]
    const int64_t *block;  // [n]
    void *out;             // [n, 2, T, D]
    int64_t n, slab_blocks, block_bytes;
    int64_t workers;       // threads
};

// Blocks from pinned slabs to the slots of a pool, on a GPU, by lists that it has made (`Select`): each row has its own.
struct Move {
    const int64_t *slab;       // addresses of the slabs, each [R, slab_blocks, 2, T, D]
    const int32_t *block;      // [R, S]
    const int32_t *slot;       // [R, S]
    const int32_t *moves;      // [R] how many of them
    void *key, *value;         // [R, S, T, D]
    int64_t *stall_ns;        // [1] adds up the nanoseconds of launches that moved something; null: nobody asks
    int64_t rows, slab_blocks, slots, half_bytes;
};

// A new token's key and value, written where they belong: to the slot of its block, and to host memory.
struct Append {
    const void *new_key, *new_value;  // [R, D]
    void *key, *value;                // [R, S, T, D]
    const int64_t *slab;              // addresses of the slabs
    const int32_t *slot;              // [R, C] slot of each block
    const int64_t *length;            // [B] tokens of each sequence, the new one included
    int64_t *lost;                    // [1] counts tokens whose block has no slot: there must be none
    int64_t rows, kv_heads, slab_blocks, slots, capacity, tokens, token_bytes;
};

// The time on the GPU's clock, added to or taken from a sum.
struct Timestamp {
    int64_t *stall_ns;  // [1] nanoseconds
    int64_t sign;
};
