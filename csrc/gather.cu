// Blocks straight from pinned host memory into the pool: the GPU's own loads cross the bus, no copy engine, no staging.
//
// What limits it is bytes in flight on the bus, not threads: a few thread blocks with four 16-byte loads outstanding in each
// thread reach what the bus gives, and leave the rest of the GPU to the model.

#include "device.cuh"
#include "gather.h"

namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;

__global__ void __launch_bounds__(kThreads) gather_blocks_kernel(const Gather a) {
    const int64_t vectors = a.half_bytes / 16;  // of the keys, and as many of the values
    for (int64_t entry = blockIdx.x; entry < a.n; entry += gridDim.x) {
        const int64_t row = a.row[entry], block = a.block[entry];
        const int64_t place = row * a.slab_blocks + block % a.slab_blocks;
        const auto *from = reinterpret_cast<const uint4 *>(a.slab[block / a.slab_blocks]) + place * 2 * vectors;
        const int64_t to = (row * a.slots + a.slot[entry]) * vectors;
        uint4 *key = static_cast<uint4 *>(a.key) + to, *value = static_cast<uint4 *>(a.value) + to;
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
}

}  // namespace

extern "C" int gather_blocks(const Gather *a, void *stream) {
    const int64_t blocks = a->n < a->workers ? a->n : a->workers;
    if (blocks > 0)
        device::launch(gather_blocks_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), *a);
    return static_cast<int>(cudaGetLastError());
}
