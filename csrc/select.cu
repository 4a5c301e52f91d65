// Selection and residency without the host: a thread block takes a row (a sequence's KV head), from scores to the list of blocks
// that must move.
//
// Whatever has an order is found by counting, never by who comes first: the same scores give the same slots. What takes the
// time is waiting, for other threads at barriers, and for memory: there is little to compute.

#include "device.cuh"
#include "select.h"

namespace {

using namespace device;

constexpr int kThreads = 512;  // more would have to wait for a multiprocessor that does nothing else
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 256;
constexpr int kCopies = 4;   // of the histogram: scores share their first bits, and would queue at one counter
constexpr int kHeads = 4;    // query heads whose numbers a thread reads together
constexpr int kList = 1024;  // blocks that are compared each with each
constexpr int kShare = 4;    // threads that share the comparisons of one
constexpr uint32_t kNever = 0, kAlways = 0xffffffffu;
constexpr int64_t kEmpty = INT64_MIN;

// Floats in the order of unsigned integers; -inf is kNever.
__device__ __forceinline__ uint32_t ordered(float x) {
    if (!(x > -INFINITY)) return kNever;
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Shared {
    union {
        uint32_t histogram[kCopies][kBins];
        uint32_t top[kThreads];
    };
    float warp_top[kHeads][kWarps], warp_total[kHeads][kWarps];
    int warp_sum[2][kWarps];
    uint32_t digit, bound;
    int left, found;
};

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

// The least key among the `wanted` largest, and how many of those equal to it are among them. Keys of kNever don't count;
// with fewer others than wanted, the least key is 1: all of them.
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

// Blocks in shared memory, the best first: the larger key, of equal ones the lower block.
struct List {
    uint32_t *key;
    int32_t *block;
};

__device__ __forceinline__ bool before(uint32_t key, int32_t block, uint32_t other_key, int32_t other_block) {
    return key > other_key || (key == other_key && block < other_block);
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

// The `wanted` best of n blocks, into `best`, by rank; `room` has kList entries. Returns how many there are.
//
// Every few threads find their largest key. The wanted-th of these is a bound that as many keys reach, and few others: those
// that do are compared each with each. Where they are too many (equal keys, or blocks wanted by the hundred) the least key
// that is wanted is found by radix selection.
template <typename Key>
__device__ __forceinline__ int best_blocks(int n, int wanted, List best, List room, Shared &shared, const Key &key) {
    if (wanted <= 0) return 0;
    if (wanted <= kThreads / 2) {
        int together = 1;  // threads that find a maximum
        while (kThreads / (2 * together) >= 2 * wanted && together < kWarp) together *= 2;
        const int groups = kThreads / together;
        uint32_t top = kNever;
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += kThreads) top = max(top, key(i));
        for (int offset = 1; offset < together; offset *= 2) top = max(top, __shfl_xor_sync(kAll, top, offset));
        if (threadIdx.x % together == 0) shared.top[threadIdx.x / together] = top;
        if (threadIdx.x == 0) shared.found = 0, shared.bound = 1;
        __syncthreads();
        rank_all(groups, [&](int j, int i) { return before(shared.top[j], j, shared.top[i], i); },
                 [&](int i, int rank) {
                     if (rank == wanted - 1 && shared.top[i] != kNever) shared.bound = shared.top[i];
                 });
        __syncthreads();
        const uint32_t bound = shared.bound;
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += kThreads) {
            const uint32_t x = key(i);
            if (x < bound) continue;
            const int at = atomicAdd(&shared.found, 1);
            if (at < kList) {
                room.key[at] = x;
                room.block[at] = i;
            }
        }
        __syncthreads();
        const int found = shared.found;
        if (found <= kList) {
            rank_all(found, [&](int j, int i) { return before(room.key[j], room.block[j], room.key[i], room.block[i]); },
                     [&](int i, int rank) {
                         if (rank >= wanted) return;
                         best.key[rank] = room.key[i];
                         best.block[rank] = room.block[i];
                     });
            __syncthreads();
            return min(found, wanted);
        }
    }
    int of_equal = 0;
    const uint32_t least = least_of_best(n, wanted, &of_equal, shared, key);
    // A thread's blocks lie side by side here: equal ones are taken in order. Ranks are by block then, not by key.
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
            best.block[at] = i;
        }
        above += x > least;
        same += x == least;
    }
    __syncthreads();
    return total[0] + min(total[1], of_equal);
}

// For each block the sum over the heads of its share of what a head attends to, as the bits of a float in `key`; each head's
// log-sum-exp over all blocks in `rest`.
// What is read here is not written meanwhile; __restrict__ lets several loads be under way.
__device__ __forceinline__ void shares(const float *__restrict__ sum, int64_t capacity, int n, int heads,
                                       uint32_t *__restrict__ key, float *rest, Shared &shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int m0 = 0; m0 < heads; m0 += kHeads) {
        float top[kHeads], total[kHeads];
#pragma unroll
        for (int m = 0; m < kHeads; ++m) top[m] = -INFINITY, total[m] = 0.f;
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += kThreads)
#pragma unroll
            for (int m = 0; m < kHeads; ++m)
                if (m0 + m < heads) top[m] = fmaxf(top[m], sum[(m0 + m) * capacity + i]);
        // Each warp's own peak serves its sums: where it has none at all, 0 does.
#pragma unroll
        for (int m = 0; m < kHeads; ++m) {
            top[m] = warp_max(top[m]);
            if (top[m] == -INFINITY) top[m] = 0.f;
        }
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += kThreads)
#pragma unroll
            for (int m = 0; m < kHeads; ++m)
                if (m0 + m < heads) total[m] += __expf(sum[(m0 + m) * capacity + i] - top[m]);
#pragma unroll
        for (int m = 0; m < kHeads; ++m) {
            total[m] = warp_sum(total[m]);
            if (lane == 0) shared.warp_top[m][warp] = total[m] > 0.f ? top[m] : -INFINITY, shared.warp_total[m][warp] = total[m];
        }
        __syncthreads();
        float all[kHeads];
#pragma unroll
        for (int m = 0; m < kHeads; ++m) {
            const float mine = lane < kWarps ? shared.warp_top[m][lane] : -INFINITY, now = warp_max(mine);
            const float sum_m = warp_sum(mine > -INFINITY ? shared.warp_total[m][lane] * __expf(mine - now) : 0.f);
            all[m] = now > -INFINITY ? now + logf(sum_m) : -INFINITY;
            if (threadIdx.x == 0 && m0 + m < heads) rest[m0 + m] = all[m];
        }
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += kThreads) {
            float share = m0 ? __uint_as_float(key[i]) : 0.f;
#pragma unroll
            for (int m = 0; m < kHeads; ++m)
                if (m0 + m < heads && all[m] > -INFINITY) share += __expf(sum[(m0 + m) * capacity + i] - all[m]);
            key[i] = __float_as_uint(share);
        }
        __syncthreads();
    }
}

size_t rows_bytes(int64_t slots) { return slots * (8 + 8 * (1 + 1 + 3) + 4 + 4 + 1) + 8 * kList; }

// What is in shared memory of that size.
struct Rows {
    int64_t *age;      // of each slot
    List chosen;       // blocks, and in place of keys their slots
    List best, room;
    List entry;        // 3 S: what is resident, the best others, what is always chosen
    int32_t *given, *missing;
    uint8_t *kept;

    __device__ explicit Rows(void *memory, int S) {
        age = static_cast<int64_t *>(memory);
        auto *next = reinterpret_cast<int32_t *>(age + S);
        const auto take = [&next](int entries) {
            const List list = {reinterpret_cast<uint32_t *>(next), next + entries};
            next += 2 * entries;
            return list;
        };
        chosen = take(S), best = take(S), entry = take(3 * S), room = take(kList);
        given = next;
        missing = given + S;
        kept = reinterpret_cast<uint8_t *>(missing + S);
    }
};

__global__ void __launch_bounds__(kThreads) select_blocks_kernel(const Select a) {
    __shared__ Shared shared;
    __shared__ int entries;
    const int S = static_cast<int>(a.slots);
    const Rows rows(dynamic_shared(), S);
    const int64_t row = blockIdx.x, b = row / a.kv_heads;
    const int group = static_cast<int>(a.heads / a.kv_heads);
    const int64_t head0 = row * group;  // over all sequences
    const int64_t stored = a.length[0], length = stored + a.ahead;
    const int size = static_cast<int>(a.block_size);
    const int known = static_cast<int>((stored + size - 1) / size), n = static_cast<int>((length + size - 1) / size);
    const int first = static_cast<int>(a.padding[b] / size);
    const int recent = static_cast<int>(a.recent > 1 ? a.recent : 1);
    // Always chosen: from `first` to `sink_end`, and from `recent_begin` on. Never: before `first`.
    const bool everything = length <= a.limit;
    const int sink_end = everything ? n : min(n, first + static_cast<int>(a.sink_blocks));
    const int recent_begin = max(sink_end, static_cast<int>((length > recent ? length - recent : 0) / size));
    const int most = everything ? n : static_cast<int>(a.limit / size);
    int64_t *block = a.block + row * S, *active = a.active + row * S, *use = a.use + row * S;
    int32_t *slot = a.slot + row * a.capacity;
    uint32_t *key = a.key + row * a.capacity;
    const auto settled = [&](int i, uint32_t x) {
        return i < first ? kNever : i < sink_end || i >= recent_begin ? kAlways : x;
    };

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
        shares(a.sum + head0 * a.capacity, a.capacity, n, group, key, a.rest + head0, shared);
    }
    if (a.ahead || a.chooses) {
        int chosen;
        if (a.ahead) {
            const float *score = a.score + row * a.capacity;
            chosen = best_blocks(n, most, rows.best, rows.room, shared, [&](int i) {
                return settled(i, i < known ? ordered(score[i]) : kNever);
            });
            for (int w = threadIdx.x; w < chosen; w += kThreads) {
                rows.chosen.block[w] = rows.best.block[w];
                rows.chosen.key[w] = static_cast<uint32_t>(slot[rows.best.block[w]]);
            }
            __syncthreads();
        } else {
            // The best absent ones may come; then the best of these and what is resident are chosen.
            const int late = static_cast<int>(a.late < S ? a.late : S);
            const int comers = best_blocks(n, late, rows.best, rows.room, shared, [&](int i) {
                return slot[i] < 0 ? ordered(__uint_as_float(key[i])) : kNever;
            });
            if (threadIdx.x == 0) entries = S + comers;
            for (int i = threadIdx.x; i < S + comers; i += kThreads) {
                const int n_i = i < S ? static_cast<int>(block[i]) : rows.best.block[i - S];
                rows.entry.block[i] = n_i;
                rows.entry.key[i] = n_i < 0 || n_i >= n ? kNever : settled(n_i, ordered(__uint_as_float(key[n_i])));
            }
            __syncthreads();
            // What is always chosen is resident, as a rule.
            for (int i = first + threadIdx.x; i < n; i += kThreads) {
                if ((i >= sink_end && i < recent_begin) || slot[i] >= 0) continue;
                bool comes = false;
                for (int c = 0; c < comers; ++c) comes = comes || rows.best.block[c] == i;
                if (comes) continue;
                const int at = atomicAdd(&entries, 1);
                rows.entry.block[at] = i;
                rows.entry.key[at] = kAlways;
            }
            if (threadIdx.x == 0) shared.found = 0;
            __syncthreads();
            const int count = entries;
            const List entry = rows.entry;
            rank_all(count, [&](int j, int i) { return before(entry.key[j], entry.block[j], entry.key[i], entry.block[i]); },
                     [&](int i, int rank) {
                         if (rank >= most || entry.key[i] == kNever) return;
                         rows.chosen.block[rank] = entry.block[i];
                         rows.chosen.key[rank] = i < S ? static_cast<uint32_t>(i) : ~0u;
                         atomicAdd(&shared.found, 1);
                     });
            __syncthreads();
            chosen = shared.found;
        }

        // What is there stays. What is missing is listed in the order of rank, but for the next token's own block, which may not
        // have begun: it comes last, since nothing is there to fetch.
        for (int s = threadIdx.x; s < S; s += kThreads) {
            rows.kept[s] = 0;
            active[s] = -1;
        }
        __syncthreads();
        const int share = (chosen + kThreads - 1) / kThreads;
        const int from = min(chosen, static_cast<int>(threadIdx.x) * share), to = min(chosen, from + share);
        int count[2] = {0, 0}, place[2], total[2];
        for (int w = from; w < to; ++w) {
            const int s = static_cast<int>(rows.chosen.key[w]);
            if (s >= 0) rows.kept[s] = 1;
            else ++count[rows.chosen.block[w] >= known];
        }
        scan(count, place, total, shared);
        const int misses = total[0] + total[1];
        place[1] += total[0];
        for (int w = from; w < to; ++w)
            if (static_cast<int>(rows.chosen.key[w]) < 0)
                rows.missing[place[rows.chosen.block[w] >= known]++] = rows.chosen.block[w];
        for (int s = threadIdx.x; s < S; s += kThreads)
            rows.age[s] = rows.kept[s] ? INT64_MAX : block[s] < 0 ? kEmpty + s : (use[s] << 32) + block[s];
        __syncthreads();
        if (misses) {
            rank_all(S, [&](int j, int i) { return rows.age[j] < rows.age[i]; },
                     [&](int s, int rank) {
                         if (rank >= misses || rows.kept[s]) return;
                         rows.given[rank] = s;
                         if (block[s] >= 0) slot[block[s]] = -1;
                     });
            __syncthreads();
            for (int i = threadIdx.x; i < misses; i += kThreads) {
                const int s = rows.given[i], n_i = rows.missing[i];
                block[s] = n_i;
                slot[n_i] = s;
                a.move_block[row * S + i] = n_i;
                a.move_slot[row * S + i] = s;
            }
            __syncthreads();
        }
        const int64_t now = 2 * stored + a.ahead;
        for (int w = threadIdx.x; w < chosen; w += kThreads) {
            const int n_w = rows.chosen.block[w], s = slot[n_w];
            active[s] = n_w;
            use[s] = now;
        }
        if (threadIdx.x == 0) {
            a.moves[row] = total[0];
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
    const size_t shared_bytes = rows_bytes(a->slots);
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
