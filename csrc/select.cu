// Selection and residency on the GPU. A thread block takes one row (a KV head of a sequence), from scores to the list of moves.
//
// Ranks come from comparison counts, not atomics, so results are deterministic: the same scores give the same slots. The kernel
// is bound by memory latency and barriers, not by arithmetic. So it reads scores in wide loads and keeps resident and chosen
// blocks as bit sets in shared memory, and the sort keys too if they fit.

#include "best.cuh"
#include "select.h"

namespace {

using namespace best;
using device::warp_max;
using device::warp_sum;

constexpr int kHeads = 4;  // query heads that a thread reads together
constexpr int kFour = 4;   // blocks that it reads together
constexpr int kTileBlocks = kFour * kThreads;
constexpr float kLowest = -1e30f;  // below any logit, and finite, so that differences are finite
constexpr float kLog2E = 1.44269504f;
constexpr int64_t kEmpty = INT64_MIN;

struct MassSums {
    float top[kHeads][kWarps], total[kHeads][kWarps];
};

// A set of blocks, one bit each.
struct BlockSet {
    uint32_t *word;

    __device__ __forceinline__ void clear(int n) const {
        for (int i = threadIdx.x; i < (n + 31) / 32; i += kThreads) word[i] = 0;
    }
    __device__ __forceinline__ void add(int i) const { atomicOr(&word[i / 32], 1u << i % 32); }
    __device__ __forceinline__ bool has(int i) const { return word[i / 32] >> i % 32 & 1; }
    __device__ __forceinline__ uint32_t four(int i) const { return word[i / 32] >> i % 32 & 15; }
};

// Four numbers of a row, beginning at a multiple of four.
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

// Stores the numbers' bits as keys. A wide store may also write up to three entries after the last one.
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

// Dynamic shared memory; its size is computed at launch (`_shared_bytes` in select.py).
struct RowScratch {
    uint32_t *key;      // C sort keys, if they fit; first, so that it is aligned for wide stores
    int64_t *age;       // age of each slot
    int32_t *held;      // block in each slot when the kernel began, -1: empty
    List chosen;        // chosen blocks; the key says whether the block is resident
    List best, room;
    int32_t *attended;  // chosen block in each slot, -1: none; reuses the memory of `best`
    List entry;         // 3 S entries: resident blocks, the best others, blocks that are always chosen
    int32_t *given, *fetched;
    BlockSet resident, wanted;

    __device__ RowScratch(void *memory, int S, int capacity, bool keys_here) {
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
        fetched = take(S);
        resident.word = reinterpret_cast<uint32_t *>(take((capacity + 31) / 32));
        wanted.word = reinterpret_cast<uint32_t *>(take((capacity + 31) / 32));
    }
};

// Which blocks of a sequence are chosen: always from `first` to `sink_end` and from `recent_begin` to `n`, never before `first`.
struct Range {
    int begun, n;  // blocks that hold a token; the same with the next token's block
    int first, sink_end, recent_begin;
    int max_chosen;  // most blocks to choose

    // From tokens stored, tokens of padding, and the most tokens to choose.
    __device__ Range(const Bounds &b, int64_t stored, int64_t padding, int64_t limit, int64_t ahead) {
        const int64_t length = stored + ahead;
        const int shift = __ffs(static_cast<int>(b.block_size)) - 1, size = 1 << shift;  // a power of two
        begun = static_cast<int>((stored + size - 1) >> shift), n = static_cast<int>((length + size - 1) >> shift);
        first = static_cast<int>(padding >> shift);
        const bool everything = length <= limit;
        const int64_t recent = b.recent > 1 ? b.recent : 1;
        // The sink's tokens are in one block more if the first is within a block; chosen if the limit has a block for it.
        const int64_t always = b.sink_blocks + ((recent - 1 + size - 1) >> shift) + 1;
        const bool more = b.sink_blocks > 0 && (padding & (size - 1)) != 0 && limit >> shift > always;
        sink_end = everything ? n : min(n, first + static_cast<int>(b.sink_blocks) + more);
        recent_begin = max(sink_end, static_cast<int>((length > recent ? length - recent : 0) >> shift));
        max_chosen = everything ? n : static_cast<int>(limit >> shift);
    }

    // A block's sort key, given its score.
    __device__ __forceinline__ uint32_t rank_key(int i, uint32_t score) const {
        return i < first ? kNever : i < sink_end || i >= recent_begin ? kAlways : ordered(__uint_as_float(score));
    }
};

// Writes to `key` each block's estimated attention mass, summed over heads, as the bits of a float; and to `rest` each head's
// log-sum-exp over all blocks. Resident blocks use their exact sums, if given. All sums are kept in registers
// (`fits_in_registers`), in tiles of blocks for kHeads heads: each is read once, and its exponential computed once.
template <int kRegisterTiles>
__device__ __forceinline__ void masses_in_registers(const Select &a, int64_t row, int n, int heads, const RowScratch &rows,
                                                    uint32_t *key, MassSums &scratch) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, S = static_cast<int>(a.table.slots);
    const bool wide = a.table.capacity % kFour == 0;
    const float *sums = a.sum + row * heads * a.table.capacity;
    const int s = threadIdx.x, in_slot = a.slot_sum != nullptr && s < S ? rows.held[s] : -1;
    const bool has_slot = in_slot >= 0 && in_slot < n;
    float x[kHeads][kRegisterTiles][kFour], exact[kHeads];  // base 2; later relative to the largest
#pragma unroll
    for (int m = 0; m < kHeads; ++m)
        exact[m] = has_slot && m < heads ? a.slot_sum[(row * heads + m) * S + s] * kLog2E : -INFINITY;
#pragma unroll
    for (int t = 0; t < kRegisterTiles; ++t) {
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
    for (int t = 0; t < kRegisterTiles; ++t) {
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
        if (lane == 0) scratch.top[m][warp] = top[m];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kHeads; ++m) {
        top[m] = warp_max(lane < kWarps ? scratch.top[m][lane] : kLowest);
        total[m] = exact[m] = device::exp2_approx(exact[m] - top[m]);
#pragma unroll
        for (int t = 0; t < kRegisterTiles; ++t)
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                x[m][t][j] = device::exp2_approx(x[m][t][j] - top[m]);
                total[m] += x[m][t][j];
            }
        total[m] = warp_sum(total[m]);
        if (lane == 0) scratch.total[m][warp] = total[m];
    }
    __syncthreads();
    float slot_mass = 0.f;
#pragma unroll
    for (int m = 0; m < kHeads; ++m) {
        total[m] = warp_sum(lane < kWarps ? scratch.total[m][lane] : 0.f);
        if (threadIdx.x == 0 && m < heads)
            a.rest[row * heads + m] = total[m] > 0.f ? (top[m] + log2f(total[m])) / kLog2E : -INFINITY;
        total[m] = total[m] > 0.f ? 1.f / total[m] : 0.f;  // a head without visible keys has no mass
        slot_mass = fmaf(exact[m], total[m], slot_mass);
    }
#pragma unroll
    for (int t = 0; t < kRegisterTiles; ++t) {
        const int i = kFour * static_cast<int>(t * kThreads + threadIdx.x);
        if (i >= n) continue;
        float mass[kFour] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int m = 0; m < kHeads; ++m)
#pragma unroll
            for (int j = 0; j < kFour; ++j) mass[j] = fmaf(x[m][t][j], total[m], mass[j]);
        store_four(key, i, n, wide, mass);
    }
    __syncthreads();
    if (has_slot) key[in_slot] = __float_as_uint(slot_mass);
    __syncthreads();
}

// Whether `masses_in_registers` supports these sizes.
template <int kRegisterTiles>
__device__ __forceinline__ bool fits_in_registers(int n, int heads, int slots) {
    return n <= kRegisterTiles * kTileBlocks && heads <= kHeads && slots <= kThreads;
}

// As `masses_in_registers`, for any number of blocks, heads and slots; reads estimates twice.
__device__ __forceinline__ void masses_in_memory(const Select &a, int64_t row, int n, int heads, const RowScratch &rows,
                                                 uint32_t *key, MassSums &scratch) {
    const int32_t *held = rows.held;
    const BlockSet resident = rows.resident;
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
            if (lane == 0) scratch.top[m][warp] = now, scratch.total[m][warp] = total[m];
        }
        __syncthreads();
        float all[kHeads];  // base 2; -inf for a head without visible keys
#pragma unroll
        for (int m = 0; m < kHeads; ++m) {
            const float mine = lane < kWarps ? scratch.top[m][lane] : kLowest, now = warp_max(mine);
            const float sum = warp_sum(lane < kWarps ? scratch.total[m][lane] * device::exp2_approx(mine - now) : 0.f);
            all[m] = sum > 0.f ? now + log2f(sum) : -INFINITY;
            if (threadIdx.x == 0 && m0 + m < heads) a.rest[row * heads + m0 + m] = all[m] / kLog2E;
            if (m0 + m >= heads || all[m] == -INFINITY) all[m] = INFINITY;  // no mass
        }
#pragma unroll 2
        for (int i = kFour * threadIdx.x; i < n; i += kTileBlocks) {
            float mass[kFour];
#pragma unroll
            for (int j = 0; j < kFour; ++j) mass[j] = m0 && i + j < n ? __uint_as_float(key[i + j]) : 0.f;
#pragma unroll
            for (int m = 0; m < kHeads; ++m) {
                float x[kFour];
                load_four(sum_of(m), i, n, wide, x);
#pragma unroll
                for (int j = 0; j < kFour; ++j) mass[j] += device::exp2_approx(fmaf(x[j], kLog2E, -all[m]));
            }
            const uint32_t out = resident.four(i);
#pragma unroll
            for (int j = 0; j < kFour; ++j)
                if (i + j < n && !(out >> j & 1)) key[i + j] = __float_as_uint(mass[j]);
        }
        if (exact != nullptr)
            for (int s = threadIdx.x; s < S; s += kThreads) {
                if (held[s] < 0 || held[s] >= n) continue;
                float mass = m0 ? __uint_as_float(key[held[s]]) : 0.f;
#pragma unroll
                for (int m = 0; m < kHeads; ++m)
                    if (m0 + m < heads) mass += device::exp2_approx(fmaf(exact[(m0 + m) * S + s], kLog2E, -all[m]));
                key[held[s]] = __float_as_uint(mass);
            }
        __syncthreads();
    }
}

// Chooses the best blocks, resident or not. Returns how many.
__device__ __forceinline__ int choose_any(const RowScratch &rows, const Range &range, const uint32_t *key, SelectionScratch &scratch) {
    const auto worth = [&](int i) { return range.rank_key(i, key[i]); };
    const int chosen = best_of(range.n, range.max_chosen, rows.best, rows.room, scratch, worth);
    for (int w = threadIdx.x; w < chosen; w += kThreads) {
        const int i = rows.best.index[w];
        rows.chosen.index[w] = i;
        rows.chosen.key[w] = rows.resident.has(i);
        rows.wanted.add(i);
    }
    __syncthreads();
    return chosen;
}

// Chooses the best of the resident blocks, the `late` best absent ones, and those that are always chosen.
__device__ __forceinline__ int choose_in_reach(const RowScratch &rows, const Range &range, const uint32_t *key, int S, int late,
                                               SelectionScratch &scratch) {
    __shared__ int entries;
    const int newcomers = best_of(range.n, min(late, S), rows.best, rows.room, scratch, [&](int i) {
        return rows.resident.has(i) ? kNever : ordered(__uint_as_float(key[i]));
    });
    if (threadIdx.x == 0) entries = S + newcomers, scratch.found = 0;
    for (int e = threadIdx.x; e < S + newcomers; e += kThreads) {
        const int i = e < S ? rows.held[e] : rows.best.index[e - S];
        rows.entry.index[e] = i;
        rows.entry.key[e] = i < 0 || i >= range.n ? kNever : range.rank_key(i, key[i]);
    }
    __syncthreads();
    // Blocks that are always chosen are usually resident. Add the ones that are not.
    const int always = max(range.sink_end - range.first, 0);
    for (int w = threadIdx.x; w < always + range.n - range.recent_begin; w += kThreads) {
        const int i = w < always ? range.first + w : range.recent_begin + w - always;
        if (rows.resident.has(i)) continue;
        bool comes = false;
        for (int c = 0; c < newcomers; ++c) comes = comes || rows.best.index[c] == i;
        if (comes) continue;
        const int at = atomicAdd(&entries, 1);
        rows.entry.index[at] = i;
        rows.entry.key[at] = kAlways;
    }
    __syncthreads();
    const List entry = rows.entry;
    rank_all(entries, [&](int j, int i) { return before(entry.key[j], entry.index[j], entry.key[i], entry.index[i]); },
             [&](int i, int rank) {
                 if (rank >= range.max_chosen || entry.key[i] == kNever) return;
                 rows.chosen.index[rank] = entry.index[i];
                 rows.chosen.key[rank] = i < S;
                 rows.wanted.add(entry.index[i]);
                 atomicAdd(&scratch.found, 1);
             });
    __syncthreads();
    const int chosen = scratch.found;
    __syncthreads();
    return chosen;
}

// Gives slots to the chosen blocks; resident ones keep theirs. Lists absent ones by rank. The next token's block, if it holds no
// token yet, comes last, since there is nothing to fetch. Returns how many must be fetched.
__device__ __forceinline__ int give_slots(const Table &table, const RowScratch &rows, const Range &range, int chosen, int64_t now,
                                          SelectionScratch &scratch) {
    const int S = static_cast<int>(table.slots);
    const int64_t row = blockIdx.x;
    int64_t *block = table.block + row * S, *active = table.active + row * S, *use = table.use + row * S;
    int32_t *slot = table.slot + row * table.capacity;
    const int each = (chosen + kThreads - 1) / kThreads;
    const int from = min(chosen, static_cast<int>(threadIdx.x) * each), to = min(chosen, from + each);
    int count[2] = {0, 0}, place[2], total[2];
    for (int w = from; w < to; ++w) {
        count[0] += !rows.chosen.key[w] && rows.chosen.index[w] < range.begun;
        count[1] += !rows.chosen.key[w] && rows.chosen.index[w] >= range.begun;
    }
    scan(count, place, total, scratch);
    const int absent = total[0] + total[1];
    for (int w = from; w < to; ++w) {
        if (rows.chosen.key[w]) continue;
        const int i = rows.chosen.index[w];
        rows.fetched[i < range.begun ? place[0]++ : total[0] + place[1]++] = i;
    }
    for (int s = threadIdx.x; s < S; s += kThreads) {
        const int i = rows.held[s];
        const bool kept = i >= 0 && i < range.n && rows.wanted.has(i);
        rows.age[s] = kept ? INT64_MAX : i < 0 ? kEmpty + s : (rows.age[s] << 32) + i;
        active[s] = rows.attended[s] = kept ? i : -1;
        if (kept) use[s] = now;
    }
    __syncthreads();
    if (absent) {
        rank_all(S, [&](int j, int i) { return rows.age[j] < rows.age[i]; },
                 [&](int s, int rank) {
                     if (rank >= absent || rows.age[s] == INT64_MAX) return;
                     rows.given[rank] = s;
                     if (rows.held[s] >= 0) slot[rows.held[s]] = -1;
                 });
        __syncthreads();
        for (int w = threadIdx.x; w < absent; w += kThreads) {
            const int s = rows.given[w], i = rows.fetched[w];
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

// Subtracts the attended blocks from each head's log-sum-exp over all blocks in `rest`. If nearly everything is attended, little
// precision is left, and none is needed. Warps without a head write the exact peaks of resident blocks to `peak`.
__device__ __forceinline__ void find_rest(const Select &a, const RowScratch &rows, int n, int heads) {
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

// Chooses by scores, or by estimates, of which kRegisterTiles tiles fit in the registers.
template <bool kByScores, int kRegisterTiles>
__device__ __forceinline__ void select_blocks(const Select &a) {
    __shared__ union {
        SelectionScratch of_best;
        MassSums of_masses;
    } scratch;
    static_assert(sizeof(scratch) + sizeof(int) <= 5 << 10, "as select.py has it");
    const int S = static_cast<int>(a.table.slots), capacity = static_cast<int>(a.table.capacity);
    const RowScratch rows(device::dynamic_shared(), S, capacity, a.key == nullptr);
    const int64_t row = blockIdx.x;
    const int heads = static_cast<int>(a.heads / a.bounds.kv_heads);
    uint32_t *key = a.key == nullptr ? rows.key : a.key + row * capacity;

    // Issue all loads from global memory first.
    const Bounds &b = a.bounds;
    const int64_t sequence = row / b.kv_heads, stored = b.length[sequence];
    const int64_t padding = b.padding == nullptr ? 0 : b.padding[sequence];
    const int64_t limit = b.limit - (b.deficit == nullptr ? 0 : b.deficit[row]);
    rows.resident.clear(capacity);
    rows.wanted.clear(capacity);
    for (int s = threadIdx.x; s < S; s += kThreads) {
        rows.held[s] = static_cast<int>(a.table.block[row * S + s]);
        rows.age[s] = a.table.use[row * S + s];
    }
    const Range range(b, stored, padding, limit, a.ahead);
    const int n = range.n;
    __syncthreads();
    // Without exact scores, resident blocks use their estimates.
    for (int s = threadIdx.x; s < S; s += kThreads)
        if (rows.held[s] >= 0 && rows.held[s] < n && (kByScores || a.slot_sum != nullptr)) rows.resident.add(rows.held[s]);
    __syncthreads();
    if constexpr (kByScores) {
        const float *score = a.score + row * capacity;
        const bool wide = capacity % kFour == 0;
#pragma unroll 4
        for (int i = kFour * threadIdx.x; i < n; i += kTileBlocks) {
            float x[kFour];
            load_four(score, i, a.score == nullptr ? 0 : range.begun, wide && a.score != nullptr, x);
            store_four(key, i, n, wide, x);
        }
        __syncthreads();
    } else if (fits_in_registers<kRegisterTiles>(n, heads, S)) {
        masses_in_registers<kRegisterTiles>(a, row, n, heads, rows, key, scratch.of_masses);
    } else {
        masses_in_memory(a, row, n, heads, rows, key, scratch.of_masses);
    }
    if (a.chooses) {
        const int late = static_cast<int>(a.late < range.max_chosen ? a.late : range.max_chosen);
        const int chosen = late == range.max_chosen ? choose_any(rows, range, key, scratch.of_best)
                                              : choose_in_reach(rows, range, key, S, late, scratch.of_best);
        const int fetched = give_slots(a.table, rows, range, chosen, 2 * stored + a.ahead, scratch.of_best);
        if (threadIdx.x == 0) {
            auto *counted = reinterpret_cast<unsigned long long *>(a.count);
            // A block without tokens does not count: there is nothing to fetch.
            const bool coming = n > range.begun && rows.wanted.has(range.begun);
            atomicAdd(&counted[0], static_cast<unsigned long long>(chosen - coming));
            atomicAdd(&counted[1], static_cast<unsigned long long>(fetched));
        }
    }
    if constexpr (!kByScores) find_rest(a, rows, n, heads);
}

}  // namespace
