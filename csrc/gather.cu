// Copies blocks from pinned host memory to the pool by the GPU's own loads: no copy engine, no staging buffer.
//
// The limit is bytes in flight on the bus, not threads. A few thread blocks with four outstanding 16-byte loads per thread
// saturate the bus and leave the rest of the GPU to the model.

#include "device.cuh"
#include "gather.h"

namespace {

using device::nanoseconds;

constexpr int kThreads = 128;
constexpr int kInFlight = 4;

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

__device__ __forceinline__ char *host_block(const int64_t *slab, int64_t slab_blocks, int64_t row, int64_t block, int64_t bytes) {
    return reinterpret_cast<char *>(slab[block / slab_blocks]) + (row * slab_blocks + block % slab_blocks) * bytes;
}

// The rows' moves form one list; thread blocks take its entries in turn. The numbers of moves are loaded together.
__device__ __forceinline__ void move_blocks(const Move &a) {
    __shared__ int count[kThreads];
    __shared__ int end[kThreads];  // where a row's moves end in the list
    const int64_t vectors = a.half_bytes / 16, started = nanoseconds();
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
            const int64_t to = (row * a.slots + a.slot[listed]) * vectors;
            const char *from = host_block(a.slab, a.slab_blocks, row, a.block[listed], 2 * a.half_bytes);
            copy_block(reinterpret_cast<const uint4 *>(from), static_cast<uint4 *>(a.key) + to,
                       static_cast<uint4 *>(a.value) + to, vectors);
        }
        __syncthreads();
    }
    // The first thread block has the most work, so its time is the launch's.
    if (blockIdx.x == 0 && threadIdx.x == 0 && a.stall_ns != nullptr && any) *a.stall_ns += nanoseconds() - started;
}

// Adds or subtracts the time: the sum of a pair is the time between them.
__device__ __forceinline__ void note_time(const Timestamp &a) { *a.stall_ns += a.sign * nanoseconds(); }

__device__ __forceinline__ void append_token(const Append &a) {
    const int64_t row = blockIdx.x, token = a.length[row / a.kv_heads] - 1, block = token / a.tokens, offset = token % a.tokens;
    const int64_t vectors = a.token_bytes / 16, half = a.tokens * vectors;
    const int64_t slot = a.slot[row * a.capacity + block];
    auto *host = reinterpret_cast<uint4 *>(host_block(a.slab, a.slab_blocks, row, block, 2 * a.tokens * a.token_bytes));
    const auto *new_key = static_cast<const uint4 *>(a.new_key) + row * vectors;
    const auto *new_value = static_cast<const uint4 *>(a.new_value) + row * vectors;
    if (slot < 0 && threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long *>(a.lost), 1ull);
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
        const uint4 key = new_key[v], value = new_value[v];
        host[offset * vectors + v] = key;
        host[half + offset * vectors + v] = value;
        if (slot >= 0) {
            const int64_t to = ((row * a.slots + slot) * a.tokens + offset) * vectors + v;
            static_cast<uint4 *>(a.key)[to] = key;
            static_cast<uint4 *>(a.value)[to] = value;
        }
    }
    if (offset) return;
    // A new block is zeroed: host memory is uninitialised.
    for (int64_t v = vectors + threadIdx.x; v < half; v += blockDim.x) host[v] = host[half + v] = make_uint4(0, 0, 0, 0);
}

}  // namespace
