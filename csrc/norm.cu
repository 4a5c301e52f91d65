// Root-mean-square normalisation, one thread block per row.
//
// A thread keeps its first 16 bytes of the row and the weight in registers. The rest of longer rows is read a second time, from the
// cache. Rounding is as in the torch modules: the row is converted to fp32, and back at the place that the form defines.

#include "norm.h"
#include "vector.cuh"

namespace {

using namespace device;

template <typename E>
__device__ __forceinline__ float squares(const Vector<E> &x) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Vector<E>::kSize; ++i) {
        const float y = to_float(x.element[i]);
        sum += y * y;
    }
    return sum;
}

// Sum over the thread block, returned to all threads.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float of_warp[kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    x = warp_sum(x);
    if (warps == 1) return x;
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? of_warp[lane] : 0.f);
}

template <typename E>
__device__ __forceinline__ void rms_norm(const RmsNorm &a) {
    constexpr int kSize = Vector<E>::kSize;
    const int width = static_cast<int>(a.width), begin = threadIdx.x * kSize, step = blockDim.x * kSize;
    const bool wide = a.wide;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
    const E *const x = static_cast<const E *>(a.x) + row, *const weight = static_cast<const E *>(a.weight);
    const auto read = [&](int at) { return load(x + at, wide, width - at); };
    Vector<E> own_x, own_weight;
    float total = 0.f;
    if (begin < width) {
        own_weight = load(weight + begin, wide, width - begin);  // early, since it does not depend on the sum
        own_x = read(begin);
        total = squares(own_x);
    }
    for (int at = begin + step; at < width; at += step) total += squares(read(at));
    const float mean = block_sum(total) * (1.f / static_cast<float>(width));
    const float inverse = rsqrtf(__fadd_rn(mean, static_cast<float>(a.eps)));
    const auto write = [&](int at, const Vector<E> &from, const Vector<E> &weights) {
        Vector<E> out;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const float y = __fmul_rn(to_float(from.element[i]), inverse), w = to_float(weights.element[i]);
            const float factor = a.form == kOnePlus ? __fadd_rn(1.f, w) : w;
            from_float(__fmul_rn(factor, a.form == kCastFirst ? rounded<E>(y) : y), &out.element[i]);
        }
        store(out, static_cast<E *>(a.out) + row + at, wide, width - at);
    };
    if (begin < width) write(begin, own_x, own_weight);
    for (int at = begin + step; at < width; at += step) write(at, read(at), load(weight + at, wide, width - at));
}

}  // namespace
