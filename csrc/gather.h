#pragma once
#include "kernels.h"

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
