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

constexpr int kHeads = 4;      // query heads whose numbers a thread reads together
constexpr int kFour = 4;       // blocks that it reads together
constexpr int kTileBlocks = kFour * kThreads;
constexpr int kHeldTiles = 4;  // of blocks whose numbers the threads can hold, for so many heads
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

// The same numbers as keys; where they are written together, up to three behind the last may be too.
__device__ __forceinline__ void store_four(uint32_t *key, int i, int n, bool wide, const float (&from)[kFour]) {
    if (wide) {
        *reinterpret_cast<uint4 *>(key + i) = make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]),
                                                         __float_as_uint(from[2]), __float_as_uint(from[3]));
    } else {
#pragma unroll
        for (int j = 0; j < kFour; ++j)
            if (i + j < n) key[i + j] = __float_as_uint(from[j]);
    }
}

// What is in shared memory, of a size that the launch knows (`_shared_bytes` in select.py).
struct Rows {
    uint32_t *key;      // C, if they are here: first, so that four can be written together
    int64_t *age;       // of each slot
    int32_t *held;      // block in each slot when the kernel began, -1: none, or none yet
    List chosen;        // blocks, and for keys whether they are resident
    List best, room;
    int32_t *attended;  // chosen block in each slot, -1: none; in place of what `best` no longer holds
    List entry;         // 3 S: what is resident, the best others, what is always chosen
    int32_t *given, *missing;
    Blocks resident, wanted;

    __device__ Rows(void *memory, int S, int capacity, bool keys_here) {
        key = static_cast<uint32_t *>(memory);
        age = reinterpret_cast<int64_t *>(key + (keys_here ? (capacity + kFour - 1) / kFour * kFour : 0));
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
        attended = best.index;
        given = take(S);
        missing = take(S);
        resident.word = reinterpret_cast<uint32_t *>(take((capacity + 31) / 32));
        wanted.word = reinterpret_cast<uint32_t *>(take((capacity + 31) / 32));
    }
};

// Which blocks of a sequence are chosen: always from `first` to `sink_end` and from `recent_begin` to `n`, never before `first`.
struct Range {
    int known, n;  // blocks that have begun; and with the one that the next token may begin
    int first, sink_end, recent_begin;
    int most;  // blocks chosen at most

    // Of tokens stored, tokens of padding, and tokens chosen at most.
    __device__ Range(const Bounds &b, int64_t stored, int64_t padding, int64_t limit, int64_t ahead) {
        const int64_t length = stored + ahead;
        const int shift = __ffs(static_cast<int>(b.block_size)) - 1, size = 1 << shift;  // a power of two
        known = static_cast<int>((stored + size - 1) >> shift), n = static_cast<int>((length + size - 1) >> shift);
        first = static_cast<int>(padding >> shift);
        const bool everything = length <= limit;
        sink_end = everything ? n : min(n, first + static_cast<int>(b.sink_blocks));
        const int64_t recent = b.recent > 1 ? b.recent : 1;
        recent_begin = max(sink_end, static_cast<int>((length > recent ? length - recent : 0) >> shift));
        most = everything ? n : static_cast<int>(limit >> shift);
    }

    // A block's place in the order, given its score.
    __device__ __forceinline__ uint32_t rank_key(int i, uint32_t score) const {
        return i < first ? kNever : i < sink_end || i >= recent_begin ? kAlways : ordered(__uint_as_float(score));
    }
};

// For each block the sum over the heads of its share of what a head attends to, as the bits of a float in `key`; each head's
// log-sum-exp over all blocks in `rest`. What is resident has exact sums, where these are given. The threads hold all of them
// (`can_hold`): each is read once, and its exponential taken once.
__device__ __forceinline__ void shares_of_held(const Select &a, int64_t row, int n, int heads, const Rows &rows, uint32_t *key,
                                               ShareSums &shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, S = static_cast<int>(a.table.slots);
    const bool wide = a.table.capacity % kFour == 0;
    const float *sums = a.sum + row * heads * a.table.capacity;
    const int s = threadIdx.x, in_slot = a.slot_sum != nullptr && s < S ? rows.held[s] : -1;
    const bool has_slot = in_slot >= 0 && in_slot < n;
    float x[kHeads][kHeldTiles][kFour], exact[kHeads];  // base 2, and then without the exponent of the largest
#pragma unroll
    for (int m = 0; m < kHeads; ++m)
        exact[m] = has_slot && m < heads ? a.slot_sum[(row * heads + m) * S + s] * kLog2E : -INFINITY;
#pragma unroll
    for (int t = 0; t < kHeldTiles; ++t) {
        const int i = kFour * static_cast<int>(t * kThreads + threadIdx.x);
#pragma unroll
        for (int m = 0; m < kHeads; ++m) {
            if (i < n && m < heads) {
                load_four(sums + m * a.table.capacity, i, n, wide, x[m][t]);
            } else {
#pragma unroll
                for (int j = 0; j < kFour; ++j) x[m][t][j] = -INFINITY;
            }
        }
    }
    float top[kHeads], total[kHeads];
#pragma unroll
    for (int m = 0; m < kHeads; ++m) top[m] = fmaxf(kLowest, exact[m]);
#pragma unroll
    for (int t = 0; t < kHeldTiles; ++t) {
        const int i = kFour * static_cast<int>(t * kThreads + threadIdx.x);
        const uint32_t out = i < n ? rows.resident.four(i) : 0;
#pragma unroll
        for (int m = 0; m < kHeads; ++m)
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                x[m][t][j] = out >> j & 1 ? -INFINITY : x[m][t][j] * kLog2E;
                top[m] = fmaxf(top[m], x[m][t][j]);
            }
    }
#pragma unroll
    for (int m = 0; m < kHeads; ++m) {
        top[m] = warp_max(top[m]);
        if (lane == 0) shared.top[m][warp] = top[m];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kHeads; ++m) {
        top[m] = warp_max(lane < kWarps ? shared.top[m][lane] : kLowest);
        total[m] = exact[m] = device::exp2_approx(exact[m] - top[m]);
#pragma unroll
        for (int t = 0; t < kHeldTiles; ++t)
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                x[m][t][j] = device::exp2_approx(x[m][t][j] - top[m]);
                total[m] += x[m][t][j];
            }
        total[m] = warp_sum(total[m]);
        if (lane == 0) shared.total[m][warp] = total[m];
    }
    __syncthreads();
    float share_of_slot = 0.f;
#pragma unroll
    for (int m = 0; m < kHeads; ++m) {
        total[m] = warp_sum(lane < kWarps ? shared.total[m][lane] : 0.f);
        if (threadIdx.x == 0 && m < heads)
            a.rest[row * heads + m] = total[m] > 0.f ? (top[m] + log2f(total[m])) / kLog2E : -INFINITY;
        total[m] = total[m] > 0.f ? 1.f / total[m] : 0.f;  // a head that sees nothing has no shares
        share_of_slot = fmaf(exact[m], total[m], share_of_slot);
    }
#pragma unroll
    for (int t = 0; t < kHeldTiles; ++t) {
        const int i = kFour * static_cast<int>(t * kThreads + threadIdx.x);
        if (i >= n) continue;
        float share[kFour] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int m = 0; m < kHeads; ++m)
#pragma unroll
            for (int j = 0; j < kFour; ++j) share[j] = fmaf(x[m][t][j], total[m], share[j]);
        store_four(key, i, n, wide, share);
    }
    __syncthreads();
    if (has_slot) key[in_slot] = __float_as_uint(share_of_slot);
    __syncthreads();
}

// Whether `shares_of_held` has room for them.
__device__ __forceinline__ bool can_hold(int n, int heads, int slots) {
    return n <= kHeldTiles * kTileBlocks && heads <= kHeads && slots <= kThreads;
}

// As `shares_of_held`, for any number of blocks, heads and slots: estimates are read twice.
__device__ __forceinline__ void shares_of_many(const Select &a, int64_t row, int n, int heads, const Rows &rows, uint32_t *key,
                                               ShareSums &shared) {
    const int32_t *held = rows.held;
    const Blocks resident = rows.resident;
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

// The best blocks, wherever they are. Returns how many.
__device__ __forceinline__ int choose_any(const Rows &rows, const Range &range, const uint32_t *key, Shared &shared) {
    const auto worth = [&](int i) { return range.rank_key(i, key[i]); };
    const int chosen = best_of(range.n, range.most, rows.best, rows.room, shared, worth);
    for (int w = threadIdx.x; w < chosen; w += kThreads) {
        const int i = rows.best.index[w];
        rows.chosen.index[w] = i;
        rows.chosen.key[w] = rows.resident.has(i);
        rows.wanted.add(i);
    }
    __syncthreads();
    return chosen;
}

// The same, of what is resident, the `late` best absent ones, and what is always chosen.
__device__ __forceinline__ int choose_in_reach(const Rows &rows, const Range &range, const uint32_t *key, int S, int late,
                                               Shared &shared) {
    __shared__ int entries;
    const int comers = best_of(range.n, min(late, S), rows.best, rows.room, shared, [&](int i) {
        return rows.resident.has(i) ? kNever : ordered(__uint_as_float(key[i]));
    });
    if (threadIdx.x == 0) entries = S + comers, shared.found = 0;
    for (int e = threadIdx.x; e < S + comers; e += kThreads) {
        const int i = e < S ? rows.held[e] : rows.best.index[e - S];
        rows.entry.index[e] = i;
        rows.entry.key[e] = i < 0 || i >= range.n ? kNever : range.rank_key(i, key[i]);
    }
    __syncthreads();
    // What is always chosen is resident, as a rule.
    const int always = max(range.sink_end - range.first, 0);
    for (int w = threadIdx.x; w < always + range.n - range.recent_begin; w += kThreads) {
        const int i = w < always ? range.first + w : range.recent_begin + w - always;
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
                 if (rank >= range.most || entry.key[i] == kNever) return;
                 rows.chosen.index[rank] = entry.index[i];
                 rows.chosen.key[rank] = i < S;
                 rows.wanted.add(entry.index[i]);
                 atomicAdd(&shared.found, 1);
             });
    __syncthreads();
    const int chosen = shared.found;
    __syncthreads();
    return chosen;
}

// Slots for what is chosen: what is there stays. What is missing is listed in the order of rank, but for the next token's own
// block, which may not have begun: it comes last, since nothing is there to fetch. Returns how many are to be fetched.
__device__ __forceinline__ int give_slots(const Table &table, const Rows &rows, const Range &range, int chosen, int64_t now,
                                          Shared &shared) {
    const int S = static_cast<int>(table.slots);
    const int64_t row = blockIdx.x;
    int64_t *block = table.block + row * S, *active = table.active + row * S, *use = table.use + row * S;
    int32_t *slot = table.slot + row * table.capacity;
    const int share = (chosen + kThreads - 1) / kThreads;
    const int from = min(chosen, static_cast<int>(threadIdx.x) * share), to = min(chosen, from + share);
    int count[2] = {0, 0}, place[2], total[2];
    for (int w = from; w < to; ++w) {
        count[0] += !rows.chosen.key[w] && rows.chosen.index[w] < range.known;
        count[1] += !rows.chosen.key[w] && rows.chosen.index[w] >= range.known;
    }
    scan(count, place, total, shared);
    const int misses = total[0] + total[1];
    for (int w = from; w < to; ++w) {
        if (rows.chosen.key[w]) continue;
        const int i = rows.chosen.index[w];
        rows.missing[i < range.known ? place[0]++ : total[0] + place[1]++] = i;
    }
    for (int s = threadIdx.x; s < S; s += kThreads) {
        const int i = rows.held[s];
        const bool kept = i >= 0 && i < range.n && rows.wanted.has(i);
        rows.age[s] = kept ? INT64_MAX : i < 0 ? kEmpty + s : (rows.age[s] << 32) + i;
        active[s] = rows.attended[s] = kept ? i : -1;
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
        for (int w = threadIdx.x; w < misses; w += kThreads) {
            const int s = rows.given[w], i = rows.missing[w];
            block[s] = active[s] = rows.attended[s] = i;
            use[s] = now;
            slot[i] = s;
            table.move_block[row * S + w] = i;
            table.move_slot[row * S + w] = s;
        }
    }
    if (threadIdx.x == 0) table.moves[row] = total[0];
    __syncthreads();
    return total[0];
}

// From each head's log-sum-exp over all blocks in `rest`, what is not attended to: all, less what is. Where nearly all is
// attended, little precision is left, and none needed. Warps without a head put the exact peaks of what was resident in their
// places.
__device__ __forceinline__ void find_rest(const Select &a, const Rows &rows, int n, int heads) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, S = static_cast<int>(a.table.slots);
    const int64_t row = blockIdx.x;
    const bool exact = a.slot_sum != nullptr;
    for (int m = warp; m < heads; m += kWarps) {
        const int64_t head = row * heads + m;
        const float all = a.rest[head];
        float part = 0.f;
        for (int s = lane; s < S; s += kWarp) {
            const int i = a.chooses ? rows.attended[s] : static_cast<int>(a.table.active[row * S + s]);
            if (i < 0 || i >= n) continue;
            part += expf((exact && i == rows.held[s] ? a.slot_sum[head * S + s] : a.sum[head * a.table.capacity + i]) - all);
        }
        part = warp_sum(part);
        __syncwarp();
        if (lane == 0) a.rest[head] = all > -INFINITY && part < 1.f ? all + log1pf(-part) : -INFINITY;
    }
    const int idle = heads < kWarps / 2 ? kWarps - heads : 0;
    const int begin = idle ? threadIdx.x - heads * kWarp : threadIdx.x, step = idle ? idle * kWarp : kThreads;
    if (!exact || begin < 0) return;
    for (int entry = begin; entry < S * heads; entry += step) {
        const int m = entry / S, s = entry - m * S, i = rows.held[s];
        if (i < 0 || i >= n) continue;
        const int64_t head = row * heads + m;
        a.peak[head * a.table.capacity + i] = a.slot_peak[head * S + s];
    }
}

// By scores, or by estimates.
template <bool kByScores>
__device__ __forceinline__ void select_blocks(const Select &a) {
    __shared__ union {
        Shared of_best;
        ShareSums of_shares;
    } shared;
    static_assert(sizeof(shared) + sizeof(int) <= 5 << 10, "as select.py has it");
    const int S = static_cast<int>(a.table.slots), capacity = static_cast<int>(a.table.capacity);
    const Rows rows(device::dynamic_shared(), S, capacity, a.key == nullptr);
    const int64_t row = blockIdx.x;
    const int heads = static_cast<int>(a.heads / a.bounds.kv_heads);
    uint32_t *key = a.key == nullptr ? rows.key : a.key + row * capacity;

    // All that must come from far away is asked for at once.
    const Bounds &b = a.bounds;
    const int64_t sequence = row / b.kv_heads, stored = b.length[sequence];
    const int64_t padding = b.padding == nullptr ? 0 : b.padding[sequence];
    const int64_t limit = b.limit - (b.deficit == nullptr ? 0 : b.deficit[row % b.kv_heads]);
    rows.resident.clear(capacity);
    rows.wanted.clear(capacity);
    for (int s = threadIdx.x; s < S; s += kThreads) {
        rows.held[s] = static_cast<int>(a.table.block[row * S + s]);
        rows.age[s] = a.table.use[row * S + s];
    }
    const Range range(b, stored, padding, limit, a.ahead);
    const int n = range.n;
    __syncthreads();
    // Without exact scores, the estimates of what is resident count.
    for (int s = threadIdx.x; s < S; s += kThreads)
        if (rows.held[s] >= 0 && rows.held[s] < n && (kByScores || a.slot_sum != nullptr)) rows.resident.add(rows.held[s]);
    __syncthreads();
    if constexpr (kByScores) {
        const float *score = a.score + row * capacity;
        const bool wide = capacity % kFour == 0;
#pragma unroll 4
        for (int i = kFour * threadIdx.x; i < n; i += kTileBlocks) {
            float x[kFour];
            load_four(score, i, a.score == nullptr ? 0 : range.known, wide && a.score != nullptr, x);
            store_four(key, i, n, wide, x);
        }
        __syncthreads();
    } else if (can_hold(n, heads, S)) {
        shares_of_held(a, row, n, heads, rows, key, shared.of_shares);
    } else {
        shares_of_many(a, row, n, heads, rows, key, shared.of_shares);
    }
    if (a.chooses) {
        const int late = static_cast<int>(a.late < range.most ? a.late : range.most);
        const int chosen = late == range.most ? choose_any(rows, range, key, shared.of_best)
                                              : choose_in_reach(rows, range, key, S, late, shared.of_best);
        const int fetched = give_slots(a.table, rows, range, chosen, 2 * stored + a.ahead, shared.of_best);
        if (threadIdx.x == 0) {
            auto *counted = reinterpret_cast<unsigned long long *>(a.count);
            // A block that has not begun does not count: nothing of it is there.
            const bool coming = n > range.known && rows.wanted.has(range.known);
            atomicAdd(&counted[0], static_cast<unsigned long long>(chosen - coming));
            atomicAdd(&counted[1], static_cast<unsigned long long>(fetched));
        }
    }
    if constexpr (!kByScores) find_rest(a, rows, n, heads);
}

}  // namespace
