// The best of many keys, by one thread block: in the order of their ranks, found by counting, so that the same keys always give
// the same list.
#pragma once
#include "device.cuh"

namespace best {

using device::kAll;
using device::kWarp;

constexpr int kThreads = 512;  // more would have to wait for a multiprocessor that does nothing else
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 256;
constexpr int kCopies = 4;   // of the histogram: keys share their first bits, and would queue at one counter
constexpr int kList = 1024;  // keys that are compared each with each
constexpr int kShare = 4;    // threads that share the comparisons of one
constexpr uint32_t kNever = 0, kAlways = 0xffffffffu;

struct Shared {
    union {
        uint32_t histogram[kCopies][kBins];
        uint32_t top[kThreads];
    };
    int warp_sum[2][kWarps];
    uint32_t digit, bound;
    int left, found;
};

// Keys and what they belong to, in shared memory; the best first: the larger key, of equal ones the lower index.
struct List {
    uint32_t *key;
    int32_t *index;
};

// Floats in the order of unsigned integers; -inf is kNever.
__device__ __forceinline__ uint32_t ordered(float x) {
    if (!(x > -INFINITY)) return kNever;
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ bool before(uint32_t key, int32_t index, uint32_t other_key, int32_t other_index) {
    return key > other_key || (key == other_key && index < other_index);
}

// The sum of x over this lane and those before it.
__device__ __forceinline__ int warp_prefix(int x) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kAll, x, offset);
        if (lane >= offset) x += other;
    }
    return x;
}

// Prefix sums over the thread block of two counts a thread, exclusive; the totals too.
__device__ __forceinline__ void scan(int (&count)[2], int (&before)[2], int (&total)[2], Shared &shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int sum = warp_prefix(count[i]);
        before[i] = sum - count[i];
        if (lane == kWarp - 1) shared.warp_sum[i][warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int sum = warp_prefix(lane < kWarps ? shared.warp_sum[i][lane] : 0);
        total[i] = __shfl_sync(kAll, sum, kWarp - 1);
        const int upto = __shfl_sync(kAll, sum, max(warp - 1, 0));
        if (warp) before[i] += upto;
    }
    __syncthreads();
}

// Calls with_rank(i, rank) for every i below `count`, in one thread: rank is the number of j with comes_first(j, i).
template <typename ComesFirst, typename WithRank>
__device__ __forceinline__ void rank_all(int count, const ComesFirst &comes_first, const WithRank &with_rank) {
    const int part = threadIdx.x % kShare;
    for (int base = 0; base < count; base += kThreads / kShare) {
        const int i = base + static_cast<int>(threadIdx.x) / kShare;
        int rank = 0;
        if (i < count) {
#pragma unroll 4
            for (int j = part; j < count; j += kShare) rank += comes_first(j, i);
        }
#pragma unroll
        for (int offset = 1; offset < kShare; offset *= 2) rank += __shfl_xor_sync(kAll, rank, offset);
        if (i < count && part == 0) with_rank(i, rank);
    }
}

// The least key among the `wanted` largest of n, and how many of those equal to it are among them, digit by digit. Keys of
// kNever don't count; with fewer others than wanted, the least key is 1: all of them.
template <typename Key>
__device__ __forceinline__ uint32_t least_of_best(int n, int wanted, int *of_equal, Shared &shared, const Key &key) {
    uint32_t prefix = 0;
    int left = wanted;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < kCopies * kBins; i += kThreads) (&shared.histogram[0][0])[i] = 0;
        __syncthreads();
        uint32_t *bins = shared.histogram[threadIdx.x / kWarp % kCopies];
        const uint32_t above = shift == 24 ? 0 : ~0u << (shift + 8);
        for (int i = threadIdx.x; i < n; i += kThreads) {
            const uint32_t x = key(i);
            if (x != kNever && (x & above) == prefix) atomicAdd(&bins[x >> shift & (kBins - 1)], 1u);
        }
        __syncthreads();
        if (threadIdx.x < kWarp) {
            // A lane has eight digits, lane 0 the largest ones.
            int sum = 0;
            uint32_t mine[kBins / kWarp];
#pragma unroll
            for (int i = 0; i < kBins / kWarp; ++i) {
                const int digit = kBins - 1 - (static_cast<int>(threadIdx.x) * (kBins / kWarp) + i);
                mine[i] = 0;
                for (int c = 0; c < kCopies; ++c) mine[i] += shared.histogram[c][digit];
                sum += static_cast<int>(mine[i]);
            }
            const int upto = warp_prefix(sum);
            if (threadIdx.x == kWarp - 1) shared.left = -1;
            __syncwarp();
            if (upto >= left && upto - sum < left) {  // in one lane, or none
                int seen = upto - sum;
#pragma unroll
                for (int i = 0; i < kBins / kWarp; ++i) {
                    const int here = static_cast<int>(mine[i]);
                    if (seen < left && seen + here >= left) {
                        shared.digit = kBins - 1 - (threadIdx.x * (kBins / kWarp) + i);
                        shared.left = left - seen;
                    }
                    seen += here;
                }
            }
        }
        __syncthreads();
        if (shared.left < 0) {  // fewer than wanted: in the first pass, or never
            __syncthreads();
            *of_equal = n;
            return 1;
        }
        prefix |= shared.digit << shift;
        left = shared.left;
        __syncthreads();
    }
    *of_equal = left;
    return prefix;
}

// The `wanted` best of n keys, into `best`, by rank; `room` has kList entries. Returns how many there are.
//
// Every few threads find their largest key. The wanted-th of these is a bound that as many keys reach, and few others: those
// that do are compared each with each. Where they are too many (equal keys, or keys wanted by the hundred) the least key that
// is wanted is found by radix selection.
template <typename Key>
__device__ __forceinline__ int best_of(int n, int wanted, List best, List room, Shared &shared, const Key &key) {
    if (wanted <= 0) return 0;
    if (wanted <= kThreads / 2) {
        // Maxima, a power of two, are at least a quarter more than keys are wanted: with fewer, many keys would reach the bound;
        // with many more, to rank the maxima would take longer than to rank the keys. Threads that find one together are far
        // apart in their warp: neighbouring keys are alike.
        const int shift = min(31 - __clz(4 * kThreads / (5 * wanted)), 5), apart = kWarp >> shift, groups = kThreads >> shift;
        uint32_t own = kNever;
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += kThreads) own = max(own, key(i));
        uint32_t top = own;
        for (int offset = kWarp / 2; offset >= apart; offset /= 2) top = max(top, __shfl_xor_sync(kAll, top, offset));
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
        if (lane < apart) shared.top[warp * apart + lane] = top;
        if (threadIdx.x == 0) shared.found = 0, shared.bound = 1;
        __syncthreads();
        rank_all(groups, [&](int j, int i) { return before(shared.top[j], j, shared.top[i], i); },
                 [&](int i, int rank) {
                     if (rank == wanted - 1 && shared.top[i] != kNever) shared.bound = shared.top[i];
                 });
        __syncthreads();
        const uint32_t bound = shared.bound;
        if (own >= bound) {
#pragma unroll 4
            for (int i = threadIdx.x; i < n; i += kThreads) {
                const uint32_t x = key(i);
                if (x < bound) continue;
                const int at = atomicAdd(&shared.found, 1);
                if (at < kList) {
                    room.key[at] = x;
                    room.index[at] = i;
                }
            }
        }
        __syncthreads();
        const int found = shared.found;
        if (found <= kList) {
            rank_all(found, [&](int j, int i) { return before(room.key[j], room.index[j], room.key[i], room.index[i]); },
                     [&](int i, int rank) {
                         if (rank >= wanted) return;
                         best.key[rank] = room.key[i];
                         best.index[rank] = room.index[i];
                     });
            __syncthreads();
            return min(found, wanted);
        }
    }
    int of_equal = 0;
    const uint32_t least = least_of_best(n, wanted, &of_equal, shared, key);
    // A thread's keys lie side by side here: equal ones are taken in order. Ranks are by index then, not by key.
    const int chunk = (n + kThreads - 1) / kThreads;
    const int begin = min(n, static_cast<int>(threadIdx.x) * chunk), end = min(n, begin + chunk);
    int count[2] = {0, 0}, first[2], total[2];
    for (int i = begin; i < end; ++i) {
        count[0] += key(i) > least;
        count[1] += key(i) == least;
    }
    scan(count, first, total, shared);
    int above = first[0], same = first[1];
    for (int i = begin; i < end; ++i) {
        const uint32_t x = key(i);
        if (x > least || (x == least && same < of_equal)) {
            const int at = above + min(same, of_equal);
            best.key[at] = x;
            best.index[at] = i;
        }
        above += x > least;
        same += x == least;
    }
    __syncthreads();
    return total[0] + min(total[1], of_equal);
}

}  // namespace best
