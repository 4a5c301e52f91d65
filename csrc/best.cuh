// Top-k of many keys by one thread block. Ranks come from comparison counts, so results are deterministic.
#pragma once
#include "device.cuh"

namespace best {

using device::kAll;
using device::kWarp;

constexpr int kThreads = 512;  // a larger thread block would have to wait for an idle multiprocessor
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 256;
constexpr int kCopies = 4;   // of the histogram: keys share their leading bits, and would contend for one counter
constexpr int kList = 1024;  // most keys to compare pairwise
constexpr int kThreadsPerKey = 4;  // threads that share one key's comparisons
constexpr uint32_t kNever = 0, kAlways = 0xffffffffu;

struct SelectionScratch {
    union {
        uint32_t histogram[kCopies][kBins];
        uint32_t top[kThreads];
    };
    int warp_sum[2][kWarps];
    uint32_t digit, bound;
    int left, found;
};

// Keys and their indices in shared memory, best first: larger keys before smaller ones, ties by lower index.
struct List {
    uint32_t *key;
    int32_t *index;
};

// Maps floats to unsigned integers of the same order; -inf is kNever.
__device__ __forceinline__ uint32_t ordered(float x) {
    if (!(x > -INFINITY)) return kNever;
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ bool before(uint32_t key, int32_t index, uint32_t other_key, int32_t other_index) {
    return key > other_key || (key == other_key && index < other_index);
}

// Inclusive prefix sum of x over the lanes.
__device__ __forceinline__ int warp_prefix(int x) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kAll, x, offset);
        if (lane >= offset) x += other;
    }
    return x;
}

// Exclusive prefix sums over the thread block of two counts per thread, and their totals.
__device__ __forceinline__ void scan(int (&count)[2], int (&before)[2], int (&total)[2], SelectionScratch &scratch) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int sum = warp_prefix(count[i]);
        before[i] = sum - count[i];
        if (lane == kWarp - 1) scratch.warp_sum[i][warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int sum = warp_prefix(lane < kWarps ? scratch.warp_sum[i][lane] : 0);
        total[i] = __shfl_sync(kAll, sum, kWarp - 1);
        const int upto = __shfl_sync(kAll, sum, max(warp - 1, 0));
        if (warp) before[i] += upto;
    }
    __syncthreads();
}

// Calls with_rank(i, rank) once for every i below `count`; rank is the number of j with comes_first(j, i).
template <typename ComesFirst, typename WithRank>
__device__ __forceinline__ void rank_all(int count, const ComesFirst &comes_first, const WithRank &with_rank) {
    const int part = threadIdx.x % kThreadsPerKey;
    for (int base = 0; base < count; base += kThreads / kThreadsPerKey) {
        const int i = base + static_cast<int>(threadIdx.x) / kThreadsPerKey;
        int rank = 0;
        if (i < count) {
#pragma unroll 4
            for (int j = part; j < count; j += kThreadsPerKey) rank += comes_first(j, i);
        }
#pragma unroll
        for (int offset = 1; offset < kThreadsPerKey; offset *= 2) rank += __shfl_xor_sync(kAll, rank, offset);
        if (i < count && part == 0) with_rank(i, rank);
    }
}

// Radix selection: the smallest of the `wanted` largest keys, and in `ties` how many keys equal to it are wanted. Keys of kNever
// don't count. If there are fewer than wanted, returns 1, so that all are taken.
template <typename Key>
__device__ __forceinline__ uint32_t radix_threshold(int n, int wanted, int *ties, SelectionScratch &scratch, const Key &key) {
    uint32_t prefix = 0;
    int left = wanted;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < kCopies * kBins; i += kThreads) (&scratch.histogram[0][0])[i] = 0;
        __syncthreads();
        uint32_t *bins = scratch.histogram[threadIdx.x / kWarp % kCopies];
        const uint32_t above = shift == 24 ? 0 : ~0u << (shift + 8);
        for (int i = threadIdx.x; i < n; i += kThreads) {
            const uint32_t x = key(i);
            if (x != kNever && (x & above) == prefix) atomicAdd(&bins[x >> shift & (kBins - 1)], 1u);
        }
        __syncthreads();
        if (threadIdx.x < kWarp) {
            // Each lane has eight digits, lane 0 the largest ones.
            int sum = 0;
            uint32_t mine[kBins / kWarp];
#pragma unroll
            for (int i = 0; i < kBins / kWarp; ++i) {
                const int digit = kBins - 1 - (static_cast<int>(threadIdx.x) * (kBins / kWarp) + i);
                mine[i] = 0;
                for (int c = 0; c < kCopies; ++c) mine[i] += scratch.histogram[c][digit];
                sum += static_cast<int>(mine[i]);
            }
            const int upto = warp_prefix(sum);
            if (threadIdx.x == kWarp - 1) scratch.left = -1;
            __syncwarp();
            if (upto >= left && upto - sum < left) {  // in one lane, or none
                int seen = upto - sum;
#pragma unroll
                for (int i = 0; i < kBins / kWarp; ++i) {
                    const int here = static_cast<int>(mine[i]);
                    if (seen < left && seen + here >= left) {
                        scratch.digit = kBins - 1 - (threadIdx.x * (kBins / kWarp) + i);
                        scratch.left = left - seen;
                    }
                    seen += here;
                }
            }
        }
        __syncthreads();
        if (scratch.left < 0) {  // fewer than wanted; only possible in the first pass
            __syncthreads();
            *ties = n;
            return 1;
        }
        prefix |= scratch.digit << shift;
        left = scratch.left;
        __syncthreads();
    }
    *ties = left;
    return prefix;
}

// Writes the `wanted` best of n keys to `best`, by rank; `room` is scratch of kList entries. Returns their number.
//
// Groups of threads find their largest key. The wanted-th largest of these maxima is a lower bound that at least `wanted` keys
// reach, and few others. Keys that reach it are compared pairwise. If they are too many (ties, or hundreds wanted), radix
// selection finds the threshold instead.
template <typename Key>
__device__ __forceinline__ int best_of(int n, int wanted, List best, List room, SelectionScratch &scratch, const Key &key) {
    if (wanted <= 0) return 0;
    if (wanted <= kThreads / 2) {
        // The number of maxima is a power of two, at least a quarter above `wanted`. With fewer, many keys would reach the bound;
        // with many more, ranking the maxima would take longer than ranking the keys. Threads of a group are far apart in their
        // warp, since neighbouring keys are similar.
        const int shift = min(31 - __clz(4 * kThreads / (5 * wanted)), 5), apart = kWarp >> shift, groups = kThreads >> shift;
        uint32_t own = kNever;
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += kThreads) own = max(own, key(i));
        uint32_t top = own;
        for (int offset = kWarp / 2; offset >= apart; offset /= 2) top = max(top, __shfl_xor_sync(kAll, top, offset));
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
        if (lane < apart) scratch.top[warp * apart + lane] = top;
        if (threadIdx.x == 0) scratch.found = 0, scratch.bound = 1;
        __syncthreads();
        rank_all(groups, [&](int j, int i) { return before(scratch.top[j], j, scratch.top[i], i); },
                 [&](int i, int rank) {
                     if (rank == wanted - 1 && scratch.top[i] != kNever) scratch.bound = scratch.top[i];
                 });
        __syncthreads();
        const uint32_t bound = scratch.bound;
        if (own >= bound) {
#pragma unroll 4
            for (int i = threadIdx.x; i < n; i += kThreads) {
                const uint32_t x = key(i);
                if (x < bound) continue;
                const int at = atomicAdd(&scratch.found, 1);
                if (at < kList) {
                    room.key[at] = x;
                    room.index[at] = i;
                }
            }
        }
        __syncthreads();
        const int found = scratch.found;
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
    int ties = 0;
    const uint32_t threshold = radix_threshold(n, wanted, &ties, scratch, key);
    // Each thread takes consecutive keys, so ties are taken in order. The result is sorted by index, not by key.
    const int chunk = (n + kThreads - 1) / kThreads;
    const int begin = min(n, static_cast<int>(threadIdx.x) * chunk), end = min(n, begin + chunk);
    int count[2] = {0, 0}, first[2], total[2];
    for (int i = begin; i < end; ++i) {
        count[0] += key(i) > threshold;
        count[1] += key(i) == threshold;
    }
    scan(count, first, total, scratch);
    int above = first[0], same = first[1];
    for (int i = begin; i < end; ++i) {
        const uint32_t x = key(i);
        if (x > threshold || (x == threshold && same < ties)) {
            const int at = above + min(same, ties);
            best.key[at] = x;
            best.index[at] = i;
        }
        above += x > threshold;
        same += x == threshold;
    }
    __syncthreads();
    return total[0] + min(total[1], ties);
}

}  // namespace best
