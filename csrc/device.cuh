// Common parts of the GPU kernels: element types and conversions, warp reductions, and PTX instructions. Without a CUDA compiler,
// tests/emulation provides them: the same kernels, on a CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__
#define INFINITY __int_as_float(0x7f800000)
#define INT64_MAX 0x7fffffffffffffffll
#define INT64_MIN (-INT64_MAX - 1)
#else
#include <cuda_runtime.h>
#endif

#include "kernels.h"

namespace device {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float *to) { *to = x; }
__device__ __forceinline__ void from_float(float x, __half *to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16 *to) { *to = __float2bfloat16_rn(x); }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, offset));
    return x;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
    return x;
}

#ifdef __CUDACC__

// atomicAdd with acquire-release order on the whole GPU: after all earlier writes of this thread (and of its thread block, with a
// barrier between), and before all its later reads.
__device__ __forceinline__ int add_in_order(int *at, int x) {
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(x) : "memory");
    return old;
}

// 2^x to 2 units in the last place for x >= -126; 0 below.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Dynamic shared memory; the launch sets its size.
__device__ __forceinline__ void *dynamic_shared() {
    extern __shared__ uint4 device_dynamic_shared[];
    return device_dynamic_shared;
}

// d += a · b for a [16, 16] and b [16, 8] in fp16, d in fp32; register layout of PTX's mma.m16n8k16.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a and b in bf16.
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 × 8 matrices of 2-byte elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void *row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// Copies 4, 8 or 16 bytes from device to shared memory, asynchronously.
template <int kBytes = 16>
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kLeft` committed groups of this thread's copies are unfinished.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// The GPU's global clock.
__device__ __forceinline__ int64_t nanoseconds() {
    int64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

#else

inline float exp2_approx(float x) { return x < -126 ? 0.f : std::exp2(x); }

inline int64_t nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

inline int add_in_order(int *at, int x) { return atomicAdd(at, x); }
inline void *dynamic_shared() { return emulation::machine.dynamic.data(); }

template <typename E>
float half_of(uint32_t pair, int which) {
    const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
    E x;
    std::memcpy(&x, &bits, 2);
    return to_float(x);
}

template <typename E>
void multiply_pairs(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using emulation::machine;
    machine.wide[machine.current] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const int begin = emulation::warp_begin(), lane = emulation::lane();
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int of_a = row % 8 * 4 + k % 8 / 2, of_b = column * 4 + k % 8 / 2;
            d[i] += half_of<E>(machine.wide[begin + of_a][row / 8 + 2 * (k / 8)], k % 2) *
                    half_of<E>(machine.wide[begin + of_b][4 + k / 8], k % 2);
        }
    }
    __syncwarp();
}

inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { multiply_pairs<__half>(d, a, b); }
inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_pairs<__nv_bfloat16>(d, a, b);
}

inline void load_matrices(uint32_t (&to)[4], const void *row) {
    const int lane = emulation::lane();
    for (int i = 0; i < 4; ++i) {
        const auto *from = emulation::exchange(static_cast<const char *>(row), 8 * i + lane / 4);
        std::memcpy(&to[i], from + lane % 4 * 4, 4);
    }
}

template <int kBytes = 16>
void copy_async(void *to, const void *from) { std::memcpy(to, from, kBytes); }
inline void commit_copies() {}
template <int kLeft>
void wait_copies() {}

#endif

}  // namespace device

// The entry point of a program (`kernel.py`), under a name without template arguments.
#ifdef __CUDACC__
#define ENTRY(name, bounds, Arguments, ...) \
    extern "C" __global__ void __launch_bounds__ bounds name(const Arguments a) { __VA_ARGS__(a); }
#else
#define ENTRY(name, bounds, Arguments, ...)                                                                       \
    extern "C" void name(const Arguments *a, const unsigned *grid, unsigned threads, size_t shared_bytes) {       \
        emulation::launch([a] { __VA_ARGS__(*a); }, dim3(grid[0], grid[1], grid[2]), dim3(threads), shared_bytes); \
    }
#endif
