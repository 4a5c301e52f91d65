// Selection and residency without the host: a thread block takes a row (a sequence's KV head), from scores to the list of blocks
// that must move.
//
// Whatever has an order is found by counting, never by who comes first: the same scores give the same slots. What takes the
// time is waiting, for memory and at barriers; there is little to compute. So scores are read as wide as they can be, and what
// is resident or chosen is a set of bits in shared memory, as are the keys where there is room for them.

#include "best.cuh"
#include "select.h"

namespace {

using namespace best;
using device::warp_max;
using device::warp_sum;

constexpr int kHeads = 4;  // query heads whose numbers a thread reads together
constexpr int kFour = 4;   // blocks that it reads together
constexpr int kTileBlocks = kFour * kThreads;
constexpr float kLowest = -1e30f;  // below any logit, and finite: what is less far below it has a difference
constexpr float kLog2E = 1.44269504f;
constexpr int64_t kEmpty = INT64_MIN;

struct ShareSums {
    float top[kHeads][kWarps], total[kHeads][kWarps];
};

// A set of blocks, a bit each.
struct Blocks {
    uint32_t *word;

    __device__ __forceinline__ void clear(int n) const {
        for (int i = threadIdx.x; i < (n + 31) / 32; i += kThreads) word[i] = 0;
    }
    __device__ __forceinline__ void add(int i) const { atomicOr(&word[i / 32], 1u << i % 32); }
    __device__ __forceinline__ bool has(int i) const { return word[i / 32] >> i % 32 & 1; }
    __device__ __forceinline__ uint32_t four(int i) const { return word[i / 32] >> i % 32 & 15; }
};

// Four numbers of a row, from a multiple of four on.
__device__ __forceinline__ void load_four(const float *__restrict__ row, int i, int n, bool wide, float (&to)[kFour]) {
    if (wide) {
        const float4 x = *reinterpret_cast<const float4 *>(row + i);
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    } else {
#pragma unroll
        for (int j = 0; j < kFour; ++j) to[j] = i + j < n ? row[i + j] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kFour; ++j)
        if (i + j >= n) to[j] = -INFINITY;
}

// For each block the sum over the heads of its share of what a head attends to, as the bits of a float in `key`; each head's
// log-sum-exp over all blocks in `rest`. What is resident has exact sums, where these are given.
__device__ __forceinline__ void shares(const Select &a, int64_t row, int n, int heads, const int32_t *held, Blocks resident,
                                       uint32_t *key, ShareSums &shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, S = static_cast<int>(a.table.slots);
    const bool wide = a.table.capacity % kFour == 0;
    const float *sums = a.sum + row * heads * a.table.capacity;
    const float *exact = a.slot_sum == nullptr ? nullptr : a.slot_sum + row * heads * S;
    for (int m0 = 0; m0 < heads; m0 += kHeads) {
        const auto sum_of = [&](int m) { return sums + min(m0 + m, heads - 1) * a.table.capacity; };
        float top[kHeads], total[kHeads];  // base 2
#pragma unroll
        for (int m = 0; m < kHeads; ++m) top[m] = kLowest, total[m] = 0.f;
#pragma unroll 4
        for (int i = kFour * threadIdx.x; i < n; i += kTileBlocks) {
            float x[kHeads][kFour];
#pragma unroll
            for (int m = 0; m < kHeads; ++m) load_four(sum_of(m), i, n, wide, x[m]);
            const uint32_t out = resident.four(i);
#pragma unroll
            for (int m = 0; m < kHeads; ++m) {
                float now = top[m], more = 0.f;
#pragma unroll
                for (int j = 0; j < kFour; ++j) {
                    x[m][j] = out >> j & 1 ? -INFINITY : x[m][j] * kLog2E;
                    now = fmaxf(now, x[m][j]);
                }
#pragma unroll
                for (int j = 0; j < kFour; ++j) more += device::exp2_approx(x[m][j] - now);
                total[m] = fmaf(total[m], device::exp2_approx(top[m] - now), more);
                top[m] = now;
            }
        }
        if (exact != nullptr)
            for (int s = threadIdx.x; s < S; s += kThreads) {
                if (held[s] < 0 || held[s] >= n) continue;
#pragma unroll
                for (int m = 0; m < kHeads; ++m) {
                    if (m0 + m >= heads) continue;
                    const float x = exact[(m0 + m) * S + s] * kLog2E, now = fmaxf(top[m], x);
                    total[m] = fmaf(total[m], device::exp2_approx(top[m] - now), device::exp2_approx(x - now));
                    top[m] = now;
                }
            }
#pragma unroll
        for (int m = 0; m < kHeads; ++m) {
            const float now = warp_max(top[m]);
            total[m] = warp_sum(total[m] * device::exp2_approx(top[m] - now));
            if (lane == 0) shared.top[m][warp] = now, shared.total[m][warp] = total[m];
        }
        __syncthreads();
        float all[kHeads];  // base 2; -inf for a head that sees nothing
#pragma unroll
        for (int m = 0; m < kHeads; ++m) {
            const float mine = lane < kWarps ? shared.top[m][lane] : kLowest, now = warp_max(mine);
            const float sum = warp_sum(lane < kWarps ? shared.total[m][lane] * device::exp2_approx(mine - now) : 0.f);
            all[m] = sum > 0.f ? now + log2f(sum) : -INFINITY;
            if (threadIdx.x == 0 && m0 + m < heads) a.rest[row * heads + m0 + m] = all[m] / kLog2E;
            if (m0 + m >= heads || all[m] == -INFINITY) all[m] = INFINITY;  // no share of its
        }
#pragma unroll 2
        for (int i = kFour * threadIdx.x; i < n; i += kTileBlocks) {
            float share[kFour];
#pragma unroll
            for (int j = 0; j < kFour; ++j) share[j] = m0 && i + j < n ? __uint_as_float(key[i + j]) : 0.f;
#pragma unroll
            for (int m = 0; m < kHeads; ++m) {
                float x[kFour];
                load_four(sum_of(m), i, n, wide, x);
#pragma unroll
                for (int j = 0; j < kFour; ++j) share[j] += device::exp2_approx(fmaf(x[j], kLog2E, -all[m]));
            }
            const uint32_t out = resident.four(i);
#pragma unroll
            for (int j = 0; j < kFour; ++j)
                if (i + j < n && !(out >> j & 1)) key[i + j] = __float_as_uint(share[j]);
        }
        if (exact != nullptr)
            for (int s = threadIdx.x; s < S; s += kThreads) {
                if (held[s] < 0 || held[s] >= n) continue;
                float share = m0 ? __uint_as_float(key[held[s]]) : 0.f;
#pragma unroll
                for (int m = 0; m < kHeads; ++m)
                    if (m0 + m < heads) share += device::exp2_approx(fmaf(exact[(m0 + m) * S + s], kLog2E, -all[m]));
                key[held[s]] = __float_as_uint(share);
            }
        __syncthreads();
    }
}

// What is in shared memory, of a size that the launch knows (`_shared_bytes` in select.py).
struct Rows {
    int64_t *age;     // of each slot
    int32_t *held;    // block in each slot when the kernel began, -1: none, or none yet
    List chosen;      // blocks, and for keys whether they are resident
    List best, room;
    List entry;       // 3 S: what is resident, the best others, what is always chosen
    int32_t *given, *missing;
    Blocks resident, wanted;
    uint32_t *key;    // C, if they are here

    __device__ Rows(void *memory, int S, int capacity) {
        age = static_cast<int64_t *>(memory);
        auto *next = reinterpret_cast<int32_t *>(age + S);
        const auto take = [&next](int entries) {
            auto *taken = next;
            next += entries;
            return taken;
        };
        const auto list = [&take](int entries) {
            auto *keys = reinterpret_cast<uint32_t *>(take(entries));
            return List{keys, take(entries)};
        };
        held = take(S);
        chosen = list(S), best = list(S), entry = list(3 * S), room = list(kList);
        given = take(S);
        missing = take(S);
        resident.word = reinterpret_cast<uint32_t *>(take(words(capacity)));
        wanted.word = reinterpret_cast<uint32_t *>(take(words(capacity)));
        key = reinterpret_cast<uint32_t *>(next);
    }

private:
    static __device__ int words(int64_t capacity) { return static_cast<int>((capacity + 31) / 32); }
};

__device__ __forceinline__ void select_blocks(const Select &a) {
    __shared__ union {
        Shared of_best;
        ShareSums of_shares;
    } shared;
    __shared__ int entries;
    static_assert(sizeof(shared) + sizeof(entries) <= 5 << 10, "as select.py has it");
    const int S = static_cast<int>(a.table.slots), capacity = static_cast<int>(a.table.capacity);
    const Rows rows(device::dynamic_shared(), S, capacity);
    const int64_t row = blockIdx.x;
    const Bounds &b = a.bounds;
    const int kv_heads = static_cast<int>(b.kv_heads), group = static_cast<int>(a.heads) / kv_heads;
    int64_t *block = a.table.block + row * S, *active = a.table.active + row * S, *use = a.table.use + row * S;
    int32_t *slot = a.table.slot + row * a.table.capacity;
    uint32_t *key = a.keys_here ? rows.key : a.table.key + row * a.table.capacity;

    // All that must come from far away is asked for at once.
    const int64_t sequence = blockIdx.x / kv_heads, stored = b.length[sequence], length = stored + a.ahead;
    const int64_t padding = b.padding == nullptr ? 0 : b.padding[sequence];
    const int64_t limit = b.limit - (b.less == nullptr ? 0 : b.less[blockIdx.x % kv_heads]);
    rows.resident.clear(capacity);
    rows.wanted.clear(capacity);
    for (int s = threadIdx.x; s < S; s += kThreads) {
        rows.held[s] = static_cast<int>(block[s]);
        rows.age[s] = use[s];
    }
    const int shift = __ffs(static_cast<int>(b.block_size)) - 1, size = 1 << shift;  // a power of two
    const int known = static_cast<int>((stored + size - 1) >> shift), n = static_cast<int>((length + size - 1) >> shift);
    const int first = static_cast<int>(padding >> shift);
    const int recent = static_cast<int>(b.recent > 1 ? b.recent : 1);
    // Always chosen: from `first` to `sink_end`, and from `recent_begin` on. Never: before `first`.
    const bool everything = length <= limit;
    const int sink_end = everything ? n : min(n, first + static_cast<int>(b.sink_blocks));
    const int recent_begin = max(sink_end, static_cast<int>((length > recent ? length - recent : 0) >> shift));
    const int most = everything ? n : static_cast<int>(limit >> shift);
    const auto settled = [&](int i, uint32_t x) {
        return i < first ? kNever : i < sink_end || i >= recent_begin ? kAlways : x;
    };
    __syncthreads();
    const bool estimated = a.sum != nullptr, exact = a.slot_sum != nullptr;
    for (int s = threadIdx.x; s < S; s += kThreads) {
        const int i = rows.held[s];
        if (a.chooses && i >= 0 && i < n) rows.resident.add(i);
    }
    __syncthreads();
    if (estimated) {
        shares(a, row, n, group, rows.held, rows.resident, key, shared.of_shares);
    } else {
        const float *score = a.score + row * a.table.capacity;
        const bool wide = a.score != nullptr && capacity % kFour == 0;
#pragma unroll 4
        for (int i = kFour * threadIdx.x; i < n; i += kTileBlocks) {
            float x[kFour];
            load_four(score, i, a.score == nullptr ? 0 : known, wide, x);
#pragma unroll
            for (int j = 0; j < kFour; ++j)
                if (i + j < n) key[i + j] = __float_as_uint(x[j]);
        }
        __syncthreads();
    }

    if (a.chooses) {
        int chosen;
        const auto worth = [&](int i) { return settled(i, ordered(__uint_as_float(key[i]))); };
        if (a.late >= most) {  // whatever is absent may come
            chosen = best_of(n, most, rows.best, rows.room, shared.of_best, worth);
            for (int w = threadIdx.x; w < chosen; w += kThreads) {
                const int i = rows.best.index[w];
                rows.chosen.index[w] = i;
                rows.chosen.key[w] = rows.resident.has(i);
                rows.wanted.add(i);
            }
        } else {
            // The best absent ones may come; then the best of these and what is resident are chosen.
            const int late = static_cast<int>(a.late < S ? a.late : S);
            const int comers = best_of(n, late, rows.best, rows.room, shared.of_best, [&](int i) {
                return rows.resident.has(i) ? kNever : ordered(__uint_as_float(key[i]));
            });
            if (threadIdx.x == 0) entries = S + comers, shared.of_best.found = 0;
            for (int i = threadIdx.x; i < S + comers; i += kThreads) {
                const int n_i = i < S ? rows.held[i] : rows.best.index[i - S];
                rows.entry.index[i] = n_i;
                rows.entry.key[i] = n_i < 0 || n_i >= n ? kNever : worth(n_i);
            }
            __syncthreads();
            // What is always chosen is resident, as a rule.
            const int always = max(sink_end - first, 0);
            for (int w = threadIdx.x; w < always + n - recent_begin; w += kThreads) {
                const int i = w < always ? first + w : recent_begin + w - always;
                if (rows.resident.has(i)) continue;
                bool comes = false;
                for (int c = 0; c < comers; ++c) comes = comes || rows.best.index[c] == i;
                if (comes) continue;
                const int at = atomicAdd(&entries, 1);
                rows.entry.index[at] = i;
                rows.entry.key[at] = kAlways;
            }
            __syncthreads();
            const List entry = rows.entry;
            rank_all(entries, [&](int j, int i) { return before(entry.key[j], entry.index[j], entry.key[i], entry.index[i]); },
                     [&](int i, int rank) {
                         if (rank >= most || entry.key[i] == kNever) return;
                         rows.chosen.index[rank] = entry.index[i];
                         rows.chosen.key[rank] = i < S;
                         rows.wanted.add(entry.index[i]);
                         atomicAdd(&shared.of_best.found, 1);
                     });
            __syncthreads();
            chosen = shared.of_best.found;
        }
        __syncthreads();

        // What is there stays. What is missing is listed in the order of rank, but for the next token's own block, which may not
        // have begun: it comes last, since nothing is there to fetch.
        const int share = (chosen + kThreads - 1) / kThreads;
        const int from = min(chosen, static_cast<int>(threadIdx.x) * share), to = min(chosen, from + share);
        int count[2] = {0, 0}, place[2], total[2];
        for (int w = from; w < to; ++w) {
            count[0] += !rows.chosen.key[w] && rows.chosen.index[w] < known;
            count[1] += !rows.chosen.key[w] && rows.chosen.index[w] >= known;
        }
        scan(count, place, total, shared.of_best);
        const int misses = total[0] + total[1];
        for (int w = from; w < to; ++w) {
            if (rows.chosen.key[w]) continue;
            const int i = rows.chosen.index[w];
            rows.missing[i < known ? place[0]++ : total[0] + place[1]++] = i;
        }
        const int64_t now = 2 * stored + a.ahead;
        for (int s = threadIdx.x; s < S; s += kThreads) {
            const int i = rows.held[s];
            const bool kept = i >= 0 && i < n && rows.wanted.has(i);
            rows.age[s] = kept ? INT64_MAX : i < 0 ? kEmpty + s : (rows.age[s] << 32) + i;
            active[s] = kept ? i : -1;
            if (kept) use[s] = now;
        }
        __syncthreads();
        if (misses) {
            rank_all(S, [&](int j, int i) { return rows.age[j] < rows.age[i]; },
                     [&](int s, int rank) {
                         if (rank >= misses || rows.age[s] == INT64_MAX) return;
                         rows.given[rank] = s;
                         if (rows.held[s] >= 0) slot[rows.held[s]] = -1;
                     });
            __syncthreads();
            for (int i = threadIdx.x; i < misses; i += kThreads) {
                const int s = rows.given[i], n_i = rows.missing[i];
                block[s] = active[s] = n_i;
                use[s] = now;
                slot[n_i] = s;
                a.table.move_block[row * S + i] = n_i;
                a.table.move_slot[row * S + i] = s;
            }
        }
        if (threadIdx.x == 0) {
            a.table.moves[row] = total[0];
            if (a.count != nullptr) {
                auto *counted = reinterpret_cast<unsigned long long *>(a.count);
                // A block that has not begun is neither: nothing of it is there.
                atomicAdd(&counted[0], static_cast<unsigned long long>(chosen - (n > known && rows.wanted.has(known))));
                atomicAdd(&counted[1], static_cast<unsigned long long>(total[0]));
            }
        }
        __syncthreads();
    }
    if (estimated) {
        // What is not attended to: all, less what is. Where nearly all is attended, little precision is left, and none needed.
        // Warps without a head put the peaks of what was resident in their places.
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, idle = group < kWarps / 2 ? kWarps - group : 0;
        for (int m = warp; m < group; m += kWarps) {
            const int64_t head = row * group + m;
            const float all = a.rest[head];
            float part = 0.f;
            for (int s = lane; s < S; s += kWarp) {
                const int i = static_cast<int>(active[s]);
                if (i < 0 || i >= n) continue;
                part += expf((exact && i == rows.held[s] ? a.slot_sum[head * S + s] : a.sum[head * a.table.capacity + i]) - all);
            }
            part = warp_sum(part);
            __syncwarp();
            if (lane == 0) a.rest[head] = all > -INFINITY && part < 1.f ? all + log1pf(-part) : -INFINITY;
        }
        const int begin = idle ? threadIdx.x - group * kWarp : threadIdx.x, step = idle ? idle * kWarp : kThreads;
        if (exact && begin >= 0)
            for (int entry = begin; entry < S * group; entry += step) {
                const int m = entry / S, s = entry - m * S, i = rows.held[s];
                if (i < 0 || i >= n) continue;
                const int64_t head = row * group + m;
                a.peak[head * a.table.capacity + i] = a.slot_peak[head * S + s];
            }
    }
}

}  // namespace
