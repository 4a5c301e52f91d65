// Selection and residency without the host: a thread block takes a row (a sequence's KV head), from scores to the list of blocks
// that must move.
//
// The best of N scores are found by radix selection: four passes over the scores, eight bits each, give the least score that
// is chosen; equal ones go by block number. Everything that has an order is found by counting and prefix sums, never by who
// comes first: the same scores give the same slots.

#include "device.cuh"
#include "select.h"

namespace {

using namespace device;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 256;
constexpr int kCopies = 4;  // of the histogram: scores share their first bits, and would queue at one counter
constexpr uint32_t kNever = 0, kAlways = 0xffffffffu;
constexpr int64_t kEmpty = INT64_MIN;

// Floats in the order of unsigned integers; -inf is kNever.
__device__ __forceinline__ uint32_t ordered(float x) {
    if (!(x > -INFINITY)) return kNever;
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Shared {
    uint32_t histogram[kCopies][kBins];
    int warp_sum[2][kWarps];
    float warp_top[kWarps], warp_total[kWarps];
    uint32_t digit;
    int left, equal;
};

// Prefix sums over the thread block of two counts a thread, exclusive; the totals too.
__device__ __forceinline__ void scan(int (&count)[2], int (&before)[2], int (&total)[2], Shared &shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int sum = count[i];
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
            const int other = __shfl_up_sync(kAll, sum, offset);
            if (lane >= offset) sum += other;
        }
        before[i] = sum - count[i];
        if (lane == kWarp - 1) shared.warp_sum[i][warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] = 0;
        for (int w = 0; w < kWarps; ++w) {
            if (w == warp) before[i] += total[i];
            total[i] += shared.warp_sum[i][w];
        }
    }
    __syncthreads();
}

// The least key among the `wanted` largest, and how many of those equal to it are among them. Keys of kNever don't count;
// with fewer others than wanted, the least key is 1: all of them.
template <typename Key>
__device__ __forceinline__ uint32_t least_of_best(int n, int wanted, int *of_equal, int *equal, Shared &shared, const Key &key) {
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
            int upto = sum;
            for (int offset = 1; offset < kWarp; offset *= 2) {
                const int other = __shfl_up_sync(kAll, upto, offset);
                if (static_cast<int>(threadIdx.x) >= offset) upto += other;
            }
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
                        shared.equal = here;
                    }
                    seen += here;
                }
            }
        }
        __syncthreads();
        if (shared.left < 0) {  // fewer than wanted: in the first pass, or never
            __syncthreads();
            *of_equal = n;
            *equal = n;
            return 1;
        }
        prefix |= shared.digit << shift;
        left = shared.left;
        *equal = shared.equal;
        __syncthreads();
    }
    *of_equal = left;
    return prefix;
}

// Log-sum-exp over the thread block of n numbers.
__device__ __forceinline__ float log_sum_exp(const float *x, int n, Shared &shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float top = -INFINITY;
    for (int i = threadIdx.x; i < n; i += kThreads) top = fmaxf(top, x[i]);
    top = warp_max(top);
    if (lane == 0) shared.warp_top[warp] = top;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.warp_top[w]);
    float total = 0.f;
    if (top > -INFINITY)
        for (int i = threadIdx.x; i < n; i += kThreads) total += expf(x[i] - top);
    total = warp_sum(total);
    if (lane == 0) shared.warp_total[warp] = total;
    __syncthreads();
    total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += shared.warp_total[w];
    __syncthreads();
    return top > -INFINITY ? top + logf(total) : -INFINITY;
}

__global__ void __launch_bounds__(kThreads) select_blocks_kernel(const Select a) {
    __shared__ Shared shared;
    // Of dynamic size: for each slot its age, whether its block stays, the wanted blocks, the slots to be given away.
    int64_t *age = static_cast<int64_t *>(dynamic_shared());
    const int S = static_cast<int>(a.slots);
    int32_t *wanted = reinterpret_cast<int32_t *>(age + S), *given = wanted + S, *missing = given + S;
    uint8_t *kept = reinterpret_cast<uint8_t *>(missing + S);

    const int64_t row = blockIdx.x, b = row / a.kv_heads;
    const int group = static_cast<int>(a.heads / a.kv_heads);
    const int64_t head0 = row * group;  // over all sequences
    const int64_t stored = a.length[0], length = stored + a.ahead;
    const int size = static_cast<int>(a.block_size);
    const int known = static_cast<int>((stored + size - 1) / size), n = static_cast<int>((length + size - 1) / size);
    const int first = static_cast<int>(a.padding[b] / size);
    const int recent = static_cast<int>(a.recent > 1 ? a.recent : 1);
    const int first_recent = static_cast<int>((length > recent ? length - recent : 0) / size);
    const bool everything = length <= a.limit;
    int64_t *block = a.block + row * S, *active = a.active + row * S, *use = a.use + row * S;
    int32_t *slot = a.slot + row * a.capacity;
    uint32_t *key = a.key + row * a.capacity;
    const int chunk = (n + kThreads - 1) / kThreads;  // blocks of a thread, side by side, where their order counts
    const int begin = min(n, static_cast<int>(threadIdx.x) * chunk), end = min(n, begin + chunk);

    if (!a.ahead) {
        if (a.slot_sum != nullptr) {
            for (int i = threadIdx.x; i < S * group; i += kThreads) {
                const int s = i % S, m = i / S;
                if (block[s] < 0 || block[s] >= n) continue;
                a.peak[(head0 + m) * a.capacity + block[s]] = a.slot_peak[(head0 + m) * S + s];
                a.sum[(head0 + m) * a.capacity + block[s]] = a.slot_sum[(head0 + m) * S + s];
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < n; i += kThreads) key[i] = 0;
        for (int m = 0; m < group; ++m) {
            // Each head's shares are added to the key, as a float still.
            const float *sum = a.sum + (head0 + m) * a.capacity;
            const float all = log_sum_exp(sum, n, shared);
            if (threadIdx.x == 0) a.rest[head0 + m] = all;
            if (all > -INFINITY)
                for (int i = threadIdx.x; i < n; i += kThreads)
                    key[i] = __float_as_uint(__uint_as_float(key[i]) + expf(sum[i] - all));
        }
        __syncthreads();
    }
    if (a.ahead || a.chooses) {
        int of_equal = 0, equal = 0;
        for (int i = threadIdx.x; i < n; i += kThreads) {
            const bool always = everything || i < first + a.sink_blocks || i >= first_recent;
            uint32_t x;
            if (a.ahead) x = i < known ? ordered(a.score[row * a.capacity + i]) : kNever;
            else x = ordered(__uint_as_float(key[i]));
            // Always and never are settled here for the next token; for this one the absent blocks are ranked first.
            if (a.ahead) x = i < first ? kNever : always ? kAlways : x;
            key[i] = x;
        }
        __syncthreads();
        if (!a.ahead) {
            uint32_t least = 0;
            if (a.late < n) {
                if (a.late > 0)
                    least = least_of_best(n, static_cast<int>(a.late), &of_equal, &equal, shared,
                                          [&](int i) { return slot[i] < 0 ? key[i] : kNever; });
                else least = kAlways, of_equal = 0;
            }
            int count[2] = {0, 0}, before[2], total[2];
            if (least)
                for (int i = begin; i < end; ++i) count[0] += slot[i] < 0 && key[i] == least;
            scan(count, before, total, shared);
            for (int i = begin; i < end; ++i) {
                const bool absent = slot[i] < 0, always = everything || i < first + a.sink_blocks || i >= first_recent;
                uint32_t x = key[i];
                if (least && absent && (x < least || (x == least && before[0]++ >= of_equal))) x = kNever;
                key[i] = i < first ? kNever : always ? kAlways : x;
            }
            __syncthreads();
        }
        const int most = everything ? n : static_cast<int>(a.limit / size);
        const uint32_t least = least_of_best(n, most, &of_equal, &equal, shared, [&](int i) { return key[i]; });
        int count[2] = {0, 0}, before[2], total[2];
        for (int i = begin; i < end; ++i) {
            count[0] += key[i] > least;
            count[1] += key[i] == least;
        }
        scan(count, before, total, shared);
        const int chosen = total[0] + min(total[1], of_equal);
        int above = before[0], same = before[1];
        for (int i = begin; i < end; ++i) {
            const bool is_above = key[i] > least, is_same = key[i] == least;
            if (is_above || (is_same && same < of_equal)) wanted[above + min(same, of_equal)] = i;
            above += is_above;
            same += is_same;
        }
        for (int s = threadIdx.x; s < S; s += kThreads) {
            kept[s] = 0;
            active[s] = -1;
        }
        __syncthreads();

        // What is there stays; what is missing is listed in order.
        const int share = (chosen + kThreads - 1) / kThreads;
        const int from = min(chosen, static_cast<int>(threadIdx.x) * share), to = min(chosen, from + share);
        count[0] = count[1] = 0;
        for (int w = from; w < to; ++w) {
            const int s = slot[wanted[w]];
            if (s >= 0) kept[s] = 1;
            else ++count[0];
        }
        scan(count, before, total, shared);
        for (int w = from; w < to; ++w)
            if (slot[wanted[w]] < 0) missing[before[0]++] = wanted[w];
        const int misses = total[0];
        const int64_t now = 2 * stored + a.ahead;
        for (int s = threadIdx.x; s < S; s += kThreads)
            age[s] = kept[s] ? INT64_MAX : block[s] < 0 ? kEmpty + s : (use[s] << 32) + block[s];
        __syncthreads();
        if (misses)
            for (int s = threadIdx.x; s < S; s += kThreads) {
                if (kept[s]) continue;
                int rank = 0;
                for (int other = 0; other < S; ++other) rank += age[other] < age[s];
                if (rank < misses) given[rank] = s;
            }
        __syncthreads();
        for (int i = threadIdx.x; i < misses; i += kThreads) {
            const int s = given[i];
            if (block[s] >= 0) slot[block[s]] = -1;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < misses; i += kThreads) {
            const int s = given[i];
            block[s] = missing[i];
            slot[missing[i]] = s;
            a.move_block[row * S + i] = missing[i];
            a.move_slot[row * S + i] = s;
        }
        __syncthreads();
        for (int w = threadIdx.x; w < chosen; w += kThreads) {
            const int s = slot[wanted[w]];
            active[s] = wanted[w];
            use[s] = now;
        }
        if (threadIdx.x == 0) {
            // The next token's own block may not have begun: it is the last one, and nothing is there to fetch.
            a.moves[row] = misses > 0 && missing[misses - 1] >= known ? misses - 1 : misses;
            if (a.count != nullptr) {
                auto *counted = reinterpret_cast<unsigned long long *>(a.count);
                atomicAdd(&counted[0], static_cast<unsigned long long>(chosen));
                atomicAdd(&counted[1], static_cast<unsigned long long>(misses));
            }
        }
        __syncthreads();
    }
    if (!a.ahead) {
        // What is not attended to: all, less what is. Where nearly all is attended, little precision is left, and none needed.
        for (int m = threadIdx.x / kWarp; m < group; m += kWarps) {
            const float all = a.rest[head0 + m];
            float part = 0.f;
            for (int s = threadIdx.x % kWarp; s < S; s += kWarp)
                if (active[s] >= 0 && active[s] < n) part += expf(a.sum[(head0 + m) * a.capacity + active[s]] - all);
            part = warp_sum(part);
            __syncwarp();
            if (threadIdx.x % kWarp == 0)
                a.rest[head0 + m] = all > -INFINITY && part < 1.f ? all + log1pf(-part) : -INFINITY;
        }
    }
}

}  // namespace

extern "C" int select_blocks(const Select *a, void *stream) {
    const size_t shared_bytes = static_cast<size_t>(a->slots) * (8 + 3 * 4 + 1);
#ifdef __CUDACC__
    if (shared_bytes > 32 << 10) {
        const auto code = cudaFuncSetAttribute(select_blocks_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(shared_bytes));
        if (code != cudaSuccess) return static_cast<int>(code);
    }
#endif
    device::launch(select_blocks_kernel, dim3(static_cast<unsigned>(a->batch * a->kv_heads)), dim3(kThreads), shared_bytes,
                   static_cast<cudaStream_t>(stream), *a);
    return static_cast<int>(cudaGetLastError());
}
