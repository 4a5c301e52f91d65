// Copies blocks from pinned host memory to the pool by the GPU's own loads: no copy engine, no staging buffer.

#include "gather.cuh"

namespace {

using namespace gather;

__device__ __forceinline__ void move_blocks(const Move &a) {
    const int64_t vectors = a.half_bytes / 16;
    for_each_move(a, [&](int64_t row, int64_t block, int64_t slot) {
        const int64_t to = (row * a.slots + slot) * vectors;
        const char *from = host_block(a, row, block, 2 * a.half_bytes);
        copy_block(reinterpret_cast<const uint4 *>(from), static_cast<uint4 *>(a.key) + to, static_cast<uint4 *>(a.value) + to,
                   vectors);
    });
}

// Adds or subtracts the time: the sum of a pair is the time between them.
__device__ __forceinline__ void note_time(const Timestamp &a) { *a.stall_ns += a.sign * device::nanoseconds(); }

__device__ __forceinline__ void append_token(const Append &a) {
    const NewToken at(a);
    char *host = host_block(a, at.row, at.block, 2 * a.tokens * a.token_bytes);
    write_token(a, at, reinterpret_cast<uint4 *>(host));
}

}  // namespace
