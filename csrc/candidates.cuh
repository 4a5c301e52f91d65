// The candidate blocks of the next step, whose token makes the length + 1: in each sequence, the blocks between sink and recent,
// which are always attended to.
#pragma once
#include "device.cuh"

struct Candidates {
    const int64_t *length;   // [B] tokens of each sequence, the newest included
    const int64_t *padding;  // [B] left padding in tokens, after which `first` counts; null: none
    int64_t first, recent;   // first candidate block; last tokens (at least one) whose blocks are no candidates
    int64_t block_size;
};

namespace device {

struct Range {
    int first, last;  // blocks first to last − 1
};

// The sequence's candidates, among the first `columns` blocks.
__device__ __forceinline__ Range range_of(const Candidates &c, int sequence, int columns) {
    const int length = static_cast<int>(c.length[sequence]), size = static_cast<int>(c.block_size);
    const int padding = c.padding == nullptr ? 0 : static_cast<int>(c.padding[sequence]);
    const int recent = max(static_cast<int>(c.recent), 1);
    const int last = min(max(length + 1 - recent, 0) / size, (length + size - 1) / size);
    return {static_cast<int>(c.first) + padding / size, min(last, columns)};
}

}  // namespace device
