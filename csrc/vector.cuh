// 16 bytes of elements, loaded and stored at once, or one by one if rows don't begin at multiples of 16 bytes.
#pragma once
#include "device.cuh"

namespace device {

template <typename E>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(E);
    E element[kSize];
};

// `wide`: loads `kSize` elements from an address that is a multiple of 16 bytes. Else loads the first `count` (at most `kSize`);
// the others are zeros.
template <typename E>
__device__ __forceinline__ Vector<E> load(const E *from, bool wide, int count) {
    Vector<E> x;
    if (wide) {
        *reinterpret_cast<uint4 *>(&x) = *reinterpret_cast<const uint4 *>(from);
    } else {
#pragma unroll
        for (int i = 0; i < Vector<E>::kSize; ++i) {
            from_float(0.f, &x.element[i]);
            if (i < count) x.element[i] = from[i];
        }
    }
    return x;
}

template <typename E>
__device__ __forceinline__ void store(const Vector<E> &x, E *to, bool wide, int count) {
    if (wide) {
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(&x);
    } else {
#pragma unroll
        for (int i = 0; i < Vector<E>::kSize; ++i)
            if (i < count) to[i] = x.element[i];
    }
}

// A number rounded as a torch operation stores it. No fused multiply-add may replace two torch operations, since it rounds only
// once: therefore products and sums below are intrinsics.
template <typename E>
__device__ __forceinline__ float rounded(float x) {
    E y;
    from_float(x, &y);
    return to_float(y);
}

template <typename E>
__device__ __forceinline__ float product(float x, float y) { return rounded<E>(__fmul_rn(x, y)); }

}  // namespace device
