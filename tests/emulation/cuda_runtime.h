// Enough of CUDA to run the GPU's kernels on a CPU: every thread of a thread block is a fiber, thread blocks run one after
// the other. What it tests is a kernel's logic, its barriers included: a barrier that not all threads reach ends the process
// with a line that says so. It knows nothing of races within a warp's step, of memory order, or of speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __constant__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__

namespace emulation {

enum class At { kReady, kWarp, kBlock, kDone };

// A fiber begins as a context, and is left and entered by jumps from then on: those ask nothing of the system.
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool begun = false;
    std::vector<char> stack = std::vector<char>(64 << 10);
    At at = At::kReady;
    dim3 thread;
};

struct Machine {
    std::vector<Fiber> fibers;
    ucontext_t before;
    jmp_buf scheduler;
    int current = 0;
    std::function<void()> body;
    std::vector<uint64_t> exchange;          // a number a thread, for shuffles
    std::vector<std::vector<uint32_t>> wide; // more of them, for matrix instructions
    std::vector<uint4> dynamic;
};

inline Machine machine;

}  // namespace emulation

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline void enter() {
    machine.body();
    machine.fibers[machine.current].at = At::kDone;
    _longjmp(machine.scheduler, 1);
}

inline void resume(Fiber &fiber) {
    if (_setjmp(machine.scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    swapcontext(&machine.before, &fiber.context);
}

inline void wait(At at) {
    const int me = machine.current;
    machine.fibers[me].at = at;
    if (_setjmp(machine.fibers[me].place) == 0) _longjmp(machine.scheduler, 1);
}

// Lets threads go on where all that are left of a warp, or of the thread block, have arrived.
inline bool release(int begin, int end, At barrier) {
    bool any = false;
    for (int i = begin; i < end; ++i) {
        const At at = machine.fibers[i].at;
        if (at != barrier && at != At::kDone) return false;
        any = any || at == barrier;
    }
    if (any)
        for (int i = begin; i < end; ++i)
            if (machine.fibers[i].at == barrier) machine.fibers[i].at = At::kReady;
    return any;
}

inline void run_block(int threads) {
    machine.exchange.resize(threads);
    machine.wide.resize(threads);
    if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(threads);
    for (int i = 0; i < threads; ++i) {
        Fiber &fiber = machine.fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        fiber.at = At::kReady;
        fiber.begun = false;
        const unsigned n = static_cast<unsigned>(i);
        fiber.thread = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        bool moved = false;
        for (int i = 0; i < threads; ++i) {
            if (machine.fibers[i].at != At::kReady) continue;
            moved = true;
            machine.current = i;
            threadIdx = machine.fibers[i].thread;
            resume(machine.fibers[i]);
        }
        for (int w = 0; w < threads; w += 32) moved = release(w, std::min(w + 32, threads), At::kWarp) || moved;
        moved = release(0, threads, At::kBlock) || moved;
        if (moved) continue;
        const bool done = std::all_of(machine.fibers.begin(), machine.fibers.begin() + threads,
                                      [](const Fiber &fiber) { return fiber.at == At::kDone; });
        if (done) return;
        std::fprintf(stderr, "emulated kernel: threads wait at different barriers\n");
        std::abort();
    }
}

// Runs the body as every thread of every thread block; it must keep to so much dynamic shared memory.
template <typename Body>
void launch(Body body, dim3 grid, dim3 block, size_t shared_bytes) {
    constexpr size_t kBeyond = 64;
    machine.body = body;
    machine.dynamic.resize((shared_bytes + kBeyond + 15) / 16);
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                // What shared memory holds at first is nobody's to rely on.
                std::memset(machine.dynamic.data(), 0xff, machine.dynamic.size() * 16);
                run_block(static_cast<int>(block.x * block.y * block.z));
                const auto *beyond = reinterpret_cast<const unsigned char *>(machine.dynamic.data()) + shared_bytes;
                if (std::all_of(beyond, beyond + kBeyond, [](unsigned char x) { return x == 0xff; })) continue;
                std::fprintf(stderr, "emulated kernel: writes beyond its %zu bytes of shared memory\n", shared_bytes);
                std::abort();
            }
}

inline int lane() { return machine.current % 32; }
inline int warp_begin() { return machine.current - lane(); }

// What the lane `from` of this warp gives; every lane of the warp calls it.
template <typename T>
T exchange(T mine, int from) {
    static_assert(sizeof(T) <= 8);
    uint64_t raw = 0;
    std::memcpy(&raw, &mine, sizeof(T));
    machine.exchange[machine.current] = raw;
    const int begin = warp_begin();
    wait(At::kWarp);
    raw = machine.exchange[begin + (from & 31)];
    wait(At::kWarp);
    T found;
    std::memcpy(&found, &raw, sizeof(T));
    return found;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::At::kBlock); }
inline void __syncwarp(unsigned = ~0u) { emulation::wait(emulation::At::kWarp); }
inline void __threadfence() {}
inline void __threadfence_system() {}

template <typename T> T __shfl_sync(unsigned, T x, int from) { return emulation::exchange(x, from); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulation::exchange(x, emulation::lane() ^ mask); }
template <typename T> T __shfl_up_sync(unsigned, T x, unsigned delta) {
    const int lane = emulation::lane();
    return emulation::exchange(x, lane >= static_cast<int>(delta) ? lane - static_cast<int>(delta) : lane);
}
template <typename T> T __shfl_down_sync(unsigned, T x, unsigned delta) {
    const int lane = emulation::lane();
    return emulation::exchange(x, lane + static_cast<int>(delta) < 32 ? lane + static_cast<int>(delta) : lane);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    unsigned all = 0;
    for (int from = 0; from < 32; ++from) all |= static_cast<unsigned>(emulation::exchange<int>(x, from) != 0) << from;
    return all;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, !x) == 0; }

template <typename T> T atomicAdd(T *at, T x) { const T old = *at; *at = old + x; return old; }
inline unsigned long long atomicAdd(unsigned long long *at, int x) { const auto old = *at; *at += x; return old; }
template <typename T> T atomicMax(T *at, T x) { const T old = *at; *at = std::max(old, x); return old; }
template <typename T> T atomicMin(T *at, T x) { const T old = *at; *at = std::min(old, x); return old; }
template <typename T> T atomicOr(T *at, T x) { const T old = *at; *at = old | x; return old; }
template <typename T> T atomicExch(T *at, T x) { const T old = *at; *at = x; return old; }

template <typename T> T __ldg(const T *from) { return *from; }
template <typename T> T __ldcs(const T *from) { return *from; }
template <typename T> T __ldcg(const T *from) { return *from; }
template <typename T> void __stcs(T *to, T x) { *to = x; }
template <typename T> void __stcg(T *to, T x) { *to = x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned found = 0;
    for (int i = 0; i < 4; ++i) found |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return found;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float exp2f_(float x) { return std::exp2(x); }
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
