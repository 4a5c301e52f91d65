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
    uint32_t *key;        // [R, C] room for keys, where shared memory has none
    int64_t slots, capacity;
};

// What a step attends to, or the next one will, and what must move for it; the GPU's counterpart of `Selection` and
// `ResidencyTable`. C blocks is the capacity of whatever has a place for every block.
struct Select {
    Table table;
    const float *score;      // ahead [R, C]: predicted scores, -inf for never
    float *peak;             // now [B, H, C]: the sketch's estimates; exact ones of resident blocks are put in their places
    const float *sum;        // now [B, H, C]: estimates; of what is resident the exact ones count
    const float *slot_peak;  // now [B, H, S]: exact scores of what is resident; null: the estimates count
    const float *slot_sum;
    float *rest;             // now [B, H]: log-sum-exp of all blocks that are not chosen
    int64_t *count;          // what happened, added up: chosen, chosen and resident before, fetched (by ahead), or null
    const int64_t *length;   // [1] tokens of the sequence, the newest included
    const int64_t *padding;  // [B] tokens of left padding
    const int64_t *less;     // [G] tokens by which a KV head's limit is lower; null: none's is
    int64_t kv_heads, heads, block_size;
    int64_t limit, late, sink_blocks, recent;  // tokens chosen at most; absent blocks chosen at most; as in `Selection`
    int64_t ahead;                             // 1: for the next token, by `score`; 0: for this one, by `sum`
    int64_t chooses;                           // 0: `active` stays as it is, only `rest` is found
    int64_t keys_here;                         // 1: shared memory has room for keys
};
