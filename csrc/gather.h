#pragma once
#include "kernels.h"

// Copies blocks from a host store's slabs to a buffer, on a CPU.
struct Gather {
    const int64_t *slab;   // [R, slabs] where each row's part of each slab begins: [slab_blocks, 2, T, D]
    const int64_t *row;    // [n]
    const int64_t *block;  // [n]
    void *out;             // [n, 2, T, D]
    int64_t n, slabs, slab_blocks, block_bytes;
    int64_t workers;       // threads
};

// Copies blocks from pinned slabs to slots of a pool, on a GPU, by the move lists of `Select`, one per row.
struct Move {
    const int64_t *slab;       // [R, slabs] as of `Gather`
    const int32_t *block;      // [R, S]
    const int32_t *slot;       // [R, S]
    const int32_t *moves;      // [R] number of moves
    void *key, *value;         // [R, S, T, D]
    int64_t *stall_ns;        // [1] sum of the nanoseconds of launches that moved something; null: not measured
    int64_t rows, slabs, slab_blocks, slots, half_bytes;
};

// Writes a new token's key and value to its block's slot and to host memory.
struct Append {
    const void *new_key, *new_value;  // [R, D]
    void *key, *value;                // [R, S, T, D]
    const int64_t *slab;              // [R, slabs] as of `Gather`
    const int32_t *slot;              // [R, C] slot of each block
    const int64_t *length;            // [B] tokens of each sequence, the new one included
    int64_t *lost;                    // [1] counts tokens whose block has no slot, which is an error
    int64_t rows, kv_heads, slabs, slab_blocks, slots, capacity, tokens, token_bytes;
};

// Adds the GPU clock's time, times `sign`, to a sum.
struct Timestamp {
    int64_t *stall_ns;  // [1] nanoseconds
    int64_t sign;
};
