#pragma once
#include "kernels.h"

// Which block is in which slot (`SlotTable`), and what must move for it.
struct Table {
    int64_t *block;       // [R, S] block in each slot, -1: empty
    int64_t *active;      // [R, S] the same for the chosen ones, -1 for all others
    int64_t *use;         // [R, S] when a slot's block was chosen last
    int32_t *slot;        // [R, C] slot of each block, -1: absent
    int32_t *move_block;  // [R, S] blocks to fetch
    int32_t *move_slot;   // [R, S] and where to
    int32_t *moves;       // [R] how many
    int64_t slots, capacity;
};

// What bounds a choice.
struct Bounds {
    const int64_t *length;   // [B] tokens of each sequence, the newest included
    const int64_t *padding;  // [B] tokens of left padding; null: there is none
    const int64_t *deficit;     // [G] tokens by which a KV head's limit is lower; null: none's is
    int64_t kv_heads, block_size;
    int64_t limit, sink_blocks, recent;  // tokens chosen at most; chosen always: first blocks, and last tokens
};

// What a step attends to, or the next one will, and what must move for it; the GPU's counterpart of `SlotTable`'s operations in
// torch. C blocks is the capacity of whatever has a place for every block.
struct Select {
    Table table;
    Bounds bounds;
    const float *score;      // [B, G, C] scores, -inf for never; null: what is always chosen, and no other, or by `sum`
    float *peak;             // [B, H, C] estimates; exact ones of resident blocks are put in their places
    const float *sum;        // [B, H, C] estimates; of what is resident the exact ones count; null: by `score`
    const float *slot_peak;  // [B, H, S] exact scores of what is resident; null: the estimates count
    const float *slot_sum;
    float *rest;             // [B, H] takes the log-sum-exp of all blocks that are not chosen, by estimates; or null
    int64_t *count;          // what happened, added up: chosen and begun, fetched
    uint32_t *key;           // [R, C] room for keys; null: shared memory has it
    int64_t heads, late;     // H, or G by scores; absent blocks chosen at most
    int64_t ahead;           // 1: for the next token; 0: for the newest
    int64_t chooses;         // 0: `active` stays as it is, only `rest` is found
};
