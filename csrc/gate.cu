// The middle of a gated MLP, act(gate) · up, in one pass; the activation is rounded to the elements' type, as torch does.

#include "gate.h"
#include "vector.cuh"

namespace {

using namespace device;

constexpr int kThreads = 64;  // few, so that a token's short row is spread over many multiprocessors

// The same formulas as torch (aten/src/ATen/native/cuda/Activation*.cu), so that results round the same.
__device__ __forceinline__ float activated(float x, int64_t activation) {
    if (activation == kSilu) return x / (1.f + expf(-x));
    if (activation == kGelu) return x * 0.5f * (1.f + erff(x * 0.70710678118654752440f));
    const float cube = x * x * x, inner = 0.79788456080286535588f * (x + 0.044715f * cube);
    return 0.5f * x * (1.f + tanhf(inner));
}

template <typename E>
__device__ __forceinline__ void gate_up(const Gate &a) {
    const int width = static_cast<int>(a.width), at = (blockIdx.x * kThreads + threadIdx.x) * Vector<E>::kSize;
    const bool wide = a.wide;
    if (at >= width) return;
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
        const auto gate = load(static_cast<const E *>(a.gate) + row * a.gate_stride + at, wide, width - at);
        Vector<E> x = load(static_cast<const E *>(a.up) + row * a.up_stride + at, wide, width - at);
#pragma unroll
        for (int i = 0; i < Vector<E>::kSize; ++i) {
            const float y = rounded<E>(activated(to_float(gate.element[i]), a.activation));
            from_float(__fmul_rn(y, to_float(x.element[i])), &x.element[i]);
        }
        store(x, static_cast<E *>(a.out) + row * width + at, wide, width - at);
    }
}

}  // namespace
