// Reduces logits to blocks in one pass: scales, caps and masks them, then takes maximum and log-sum-exp.
//
// A few lanes share a block, four tokens each at a time. A product is read once; if a block has more than 128 tokens, twice, the
// second time from the cache.

#include "device.cuh"
#include "reduce.h"

namespace {

using device::kAll;

constexpr int kThreads = 256;
constexpr int kFour = 4;
constexpr int kMaxLanes = 32;

__device__ __forceinline__ void reduce_logits(const ReduceLogits &a) {
    const int size = static_cast<int>(a.block_size), lanes = min(size / kFour, kMaxLanes), tokens = static_cast<int>(a.tokens);
    const int first_key = static_cast<int>(a.first_key), first_block = first_key / size;
    const int touched = (first_key + tokens + size - 1) / size - first_block;
    const int place = blockIdx.x * kThreads + threadIdx.x, lane = place % lanes, block = place / lanes;
    const bool wide = a.tokens % kFour == 0 && a.first_key % kFour == 0;
    const float scaling = static_cast<float>(a.scaling), softcap = static_cast<float>(a.softcap);
    const int64_t rows = a.batch * a.heads * a.queries;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const float *product = a.product + row * a.tokens;
        const int query = static_cast<int>(a.first_query + row % a.queries);
        const uint8_t *real = a.real == nullptr ? nullptr : a.real + row / (a.heads * a.queries) * a.length;
        // Reads four logits of the block from key `key` on; -inf for masked ones.
        const auto four = [&](int key, float(&x)[kFour]) {
            const int t = key - first_key;
            const bool inside = block < touched && t >= 0 && t + kFour <= tokens;
            if (wide && inside) {
                const float4 read = *reinterpret_cast<const float4 *>(product + t);
                x[0] = read.x, x[1] = read.y, x[2] = read.z, x[3] = read.w;
            } else {
#pragma unroll
                for (int j = 0; j < kFour; ++j) x[j] = block < touched && t + j >= 0 && t + j < tokens ? product[t + j] : -INFINITY;
            }
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                if (x[j] == -INFINITY) continue;
                x[j] *= scaling;
                if (softcap != 0.f) x[j] = softcap * tanhf(x[j] / softcap);
                if (key + j > query || (real != nullptr && !real[key + j])) x[j] = -INFINITY;
            }
        };
        const int begin = (first_block + block) * size + lane * kFour, end = (first_block + block + 1) * size;
        float x[kFour], peak = -INFINITY, sum = 0.f;
        for (int key = begin; key < end; key += lanes * kFour) {
            four(key, x);
            peak = fmaxf(peak, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
        }
        for (int o = 1; o < lanes; o *= 2) peak = fmaxf(peak, __shfl_xor_sync(kAll, peak, o));
        const float from = peak > -INFINITY ? peak : 0.f;
        for (int key = begin; key < end; key += lanes * kFour) {
            if (begin + lanes * kFour < end) four(key, x);  // else it is still in registers
#pragma unroll
            for (int j = 0; j < kFour; ++j) sum += expf(x[j] - from);
        }
        for (int o = 1; o < lanes; o *= 2) sum += __shfl_xor_sync(kAll, sum, o);
        if (lane || block >= touched || peak == -INFINITY) continue;
        const int64_t to = row * a.blocks + first_block + block;
        const float here = from + logf(sum), before = a.sum[to], more = fmaxf(here, before);
        a.peak[to] = fmaxf(a.peak[to], peak);
        a.sum[to] = more + log1pf(expf(fminf(here, before) - more));
    }
}

}  // namespace
