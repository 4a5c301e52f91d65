#pragma once
#include "kernels.h"

// Which block is in which slot (`SlotTable`), and the blocks to move.
struct Table {
    int64_t *block;       // [R, S] block in each slot, -1: empty
    int64_t *active;      // [R, S] the same for chosen blocks, -1 for all others
    int64_t *use;         // [R, S] step that last chose the slot's block
    int32_t *slot;        // [R, C] slot of each block, -1: absent
    int32_t *move_block;  // [R, S] blocks to fetch
    int32_t *move_slot;   // [R, S] their slots
    int32_t *moves;       // [R] their number
    int64_t slots, capacity;
};

// Bounds of a choice.
struct Bounds {
    const int64_t *length;   // [B] tokens of each sequence, the newest included
    const int64_t *padding;  // [B] tokens of left padding; null: there is none
    const int64_t *deficit;  // [B, G] tokens by which a row's limit is lower; null: same limit for all
    int64_t kv_heads, block_size;
    int64_t limit, sink_blocks, recent;  // most tokens to choose; always chosen: this many first blocks, and last tokens
};

// Chooses the blocks of this step or the next one, and lists the moves; the kernel for `SlotTable`'s torch operations. C is the
// capacity in blocks.
struct Select {
    Table table;
    Bounds bounds;
    const float *score;      // [B, G, C] scores, -inf for never; null: choose by `sum`, or only the blocks that are always chosen
    float *peak;             // [B, H, C] estimates; resident blocks' exact peaks are written here
    const float *sum;        // [B, H, C] estimates; resident blocks use `slot_sum`; null: choose by `score`
    const float *slot_peak;  // [B, H, S] exact scores of resident blocks; null: use the estimates
    const float *slot_sum;
    float *rest;             // [B, H] output: estimated log-sum-exp of all blocks that are not chosen; or null
    int64_t *count;          // [2] adds the chosen blocks that hold a token, and the fetched ones
    uint32_t *key;           // [R, C] scratch for sort keys; null: they are in shared memory
    int64_t heads, late;     // H, or G by scores; most absent blocks to choose
    int64_t ahead;           // 1: for the next token; 0: for the newest
    int64_t chooses;         // 0: `active` is unchanged, only `rest` is computed
};
