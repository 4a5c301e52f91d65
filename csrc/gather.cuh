// Moves of blocks from host memory to the pool, and of new tokens to both: what plain blocks (gather.cu) and coded ones
// (block_code.cu) share.
//
// The limit is bytes in flight on the bus, not threads. A few thread blocks with outstanding 16-byte loads of all threads
// saturate the bus and leave the rest of the GPU to the model.
#pragma once
#include "device.cuh"
#include "gather.h"

namespace gather {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  // loads that a thread has outstanding

// Copies one block of keys and values, by all threads of a thread block.
__device__ __forceinline__ void copy_block(const uint4 *from, uint4 *key, uint4 *value, int64_t vectors) {
    for (int64_t begin = 0; begin < 2 * vectors; begin += kThreads * kInFlight) {
        uint4 held[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int64_t v = begin + i * kThreads + threadIdx.x;
            if (v < 2 * vectors) held[i] = __ldcs(from + v);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int64_t v = begin + i * kThreads + threadIdx.x;
            if (v < vectors) key[v] = held[i];
            else if (v < 2 * vectors) value[v - vectors] = held[i];
        }
    }
}

// A block in host memory, given a Move or an Append.
template <typename Args>
__device__ __forceinline__ char *host_block(const Args &a, int64_t row, int64_t block, int64_t bytes) {
    return reinterpret_cast<char *>(a.slab[row * a.slabs + block / a.slab_blocks]) + block % a.slab_blocks * bytes;
}

// Calls move(row, block, slot) with all threads of a thread block, for every entry of the rows' lists. They form one list, whose
// entries thread blocks take in turn. The numbers of moves are loaded together.
template <typename Work>
__device__ __forceinline__ void for_each_move(const Move &a, const Work &move) {
    __shared__ int count[kThreads];
    __shared__ int end[kThreads];  // where a row's moves end in the list
    const int64_t started = device::nanoseconds();
    bool any = false;
    for (int64_t first = 0; first < a.rows; first += kThreads) {
        const int rows = static_cast<int>(min(a.rows - first, int64_t{kThreads})), t = threadIdx.x;
        if (t < rows) count[t] = a.moves[first + t];
        __syncthreads();
        if (t < rows) {
            int sum = 0;
            for (int r = 0; r <= t; ++r) sum += count[r];
            end[t] = sum;
        }
        __syncthreads();
        any = any || end[rows - 1];
        int r = 0;
        for (int entry = blockIdx.x; entry < end[rows - 1]; entry += gridDim.x) {
            while (entry >= end[r]) ++r;
            const int64_t row = first + r, listed = row * a.slots + entry - (end[r] - count[r]);
            move(row, int64_t{a.block[listed]}, int64_t{a.slot[listed]});
        }
        __syncthreads();
    }
    // The first thread block has the most work, so its time is the launch's.
    if (blockIdx.x == 0 && threadIdx.x == 0 && a.stall_ns != nullptr && any) *a.stall_ns += device::nanoseconds() - started;
}

// Where a row's new token belongs.
struct NewToken {
    int64_t row, block, offset, slot;  // slot: of the block in the pool, -1 for none

    __device__ explicit NewToken(const Append &a) : row(blockIdx.x) {
        const int64_t token = a.length[row / a.kv_heads] - 1;
        block = token / a.tokens;
        offset = token % a.tokens;
        slot = a.slot[row * a.capacity + block];
    }
};

// Writes a new token to its block in host memory, whose other tokens are zeroed if it is the first, and in the pool.
__device__ __forceinline__ void write_token(const Append &a, const NewToken &at, uint4 *host) {
    const int64_t vectors = a.token_bytes / 16, half = a.tokens * vectors;
    const auto *new_key = static_cast<const uint4 *>(a.new_key) + at.row * vectors;
    const auto *new_value = static_cast<const uint4 *>(a.new_value) + at.row * vectors;
    if (at.slot < 0 && threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long *>(a.lost), 1ull);
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
        const uint4 key = new_key[v], value = new_value[v];
        host[at.offset * vectors + v] = key;
        host[half + at.offset * vectors + v] = value;
        if (at.slot >= 0) {
            const int64_t to = ((at.row * a.slots + at.slot) * a.tokens + at.offset) * vectors + v;
            static_cast<uint4 *>(a.key)[to] = key;
            static_cast<uint4 *>(a.value)[to] = value;
        }
    }
    if (at.offset) return;
    // A new block is zeroed: host memory is uninitialised.
    for (int64_t v = vectors + threadIdx.x; v < half; v += blockDim.x) host[v] = host[half + v] = make_uint4(0, 0, 0, 0);
}

}  // namespace gather
