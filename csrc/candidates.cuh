// Which blocks are candidates of the next step, whose own token is number length + 1: in each sequence, those between what a
// step attends to in any case, the sink and the recent tokens.
#pragma once
#include "device.cuh"

struct Candidates {
    const int64_t *length;   // [B] tokens of each sequence, the newest included
    const int64_t *padding;  // [B] tokens of left padding, behind which `first` counts; null: none
    int64_t first, recent;   // the first candidate, in blocks; tokens at the end, one at least, whose blocks are none
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
