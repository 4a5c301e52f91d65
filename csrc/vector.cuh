// 16 bytes of elements, as a thread reads and writes them; one by one where rows don't begin at multiples of 16 bytes.
#pragma once
#include "device.cuh"

namespace device {

template <typename E>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(E);
    E element[kSize];
};

// `wide`: there are `kSize` elements, and the address is a multiple of 16 bytes. Else the first `count` are read, if that many
// fit in; the others are zeros.
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

// As torch's operations leave a number in memory. Between two of them nothing may be contracted to a fused multiply-add,
// which would round once: therefore products and sums below are written as intrinsics.
template <typename E>
__device__ __forceinline__ float rounded(float x) {
    E y;
    from_float(x, &y);
    return to_float(y);
}

template <typename E>
__device__ __forceinline__ float product(float x, float y) { return rounded<E>(__fmul_rn(x, y)); }

}  // namespace device
