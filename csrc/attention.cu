// Sparse decode attention: one new token over the slots of a block pool; the query heads of a KV head are processed together.
//
// Every key and value is read once, from device memory to the registers of the tensor-core operands. Nothing is staged in shared
// memory, and warps don't wait for each other. A warp takes 16 tokens at a time, and loads the next keys and values as soon as
// it has used the current ones. With lane = 4·g + q:
//     logits = Q · Kᵀ    lane: of head g, for tokens 2q, 2q + 1, 2q + 8, 2q + 9; it loads keys g and g + 8
//     outᵀ  += Vᵀ · P    lane: of heads 2q, 2q + 1, for elements 8g to 8g + 7 of each 64; it loads values of its logits' tokens
// The order of a dot product's terms is free. So a lane takes 8 consecutive elements, one 16-byte load, where the instruction's
// layout has 4 times 2; and pairs of tokens are formed from two loads, without a transposition.
//
// Weights are split into two numbers of the pool's precision, which keeps fp32 accuracy. A pool in fp32 is computed by fused
// multiply-adds in the same layout.
//
// Warps, then splits over the slots, are merged by log-sum-exp (as in FlashDecoding); the last split to finish merges them.

#include "attention.h"
#include "device.cuh"

namespace {

using namespace device;

constexpr int kWarps = 4;       // of a thread block
constexpr int kHeads = 8;       // query heads of a KV head, processed together
constexpr int kTile = 16;       // tokens a warp takes at once
constexpr int kListed = 512;    // slots searched at once
constexpr int kMaxSplits = 64;  // thread blocks that share a row's slots

struct Place {
    int slot, block;
};

__device__ __forceinline__ int quad() { return threadIdx.x % kWarp / 4; }  // g
__device__ __forceinline__ int in_quad() { return threadIdx.x % 4; }       // q
// The token of the i-th of a lane's four logits.
__device__ __forceinline__ int own_token(int i) { return 2 * in_quad() + i % 2 + 8 * (i / 2); }

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
}

__device__ __forceinline__ void add_scaled(float factor, float4 x, float4 &to) {
    to.x = fmaf(factor, x.x, to.x);
    to.y = fmaf(factor, x.y, to.y);
    to.z = fmaf(factor, x.z, to.z);
    to.w = fmaf(factor, x.w, to.w);
}

// Differences from a peak of -inf would be nan: use 0.
__device__ __forceinline__ float origin(float peak) { return peak > -INFINITY ? peak : 0.f; }

template <typename E>
__device__ __forceinline__ void load_vector(const E *from, bool there, uint32_t (&to)[4]) {
    const uint4 raw = there ? __ldcg(reinterpret_cast<const uint4 *>(from)) : uint4{};
    to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
}

template <typename E>
__device__ __forceinline__ uint32_t pack(E low, E high) {
    static_assert(sizeof(E) == 2);
    const E pair[2] = {low, high};
    uint32_t word;
    memcpy(&word, pair, sizeof(word));
    return word;
}

template <typename E>
__device__ __forceinline__ void multiply_as(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (same<E, __half>) multiply(d, a, b);
    else multiply_bf16(d, a, b);
}

// A lane's output accumulators: [64 elements][element % 4][2 · (element / 4 % 2) + head % 2].
template <int kWidth>
using Sums = float[kWidth / 64][4][4];

// Keys and values of 16 tokens in a warp's registers. kWidth: largest head size.
template <typename E, int kWidth>
struct Tile {
    // In shared memory: the lanes' operands of each product. There are half as many heads as matrix rows.
    using Query = uint4[kWidth / 16][kWarp];
    uint32_t key[2][kWidth / 32][4], value[4][kWidth / 64][4];

    // Loads the thread block's queries; `from` is the query of the lane's head.
    __device__ __forceinline__ void load_query(const E *from, int D, Query &query) {
        for (int j = threadIdx.x / kWarp; j < kWidth / 32; j += kWarps) {
            uint32_t vector[4];
            load_vector(from + 32 * j + 8 * in_quad(), 32 * j + 8 * in_quad() < D, vector);
            query[2 * j][threadIdx.x % kWarp] = make_uint4(vector[0], 0, vector[1], 0);
            query[2 * j + 1][threadIdx.x % kWarp] = make_uint4(vector[2], 0, vector[3], 0);
        }
    }

    // Rows beyond the last are copies of it; they are masked.
    __device__ __forceinline__ void load_key(const E *from, int rows, int D) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const E *row = from + min(quad() + 8 * h, rows - 1) * D + 8 * in_quad();
#pragma unroll
            for (int j = 0; j < kWidth / 32; ++j) load_vector(row + 32 * j, 32 * j + 8 * in_quad() < D, key[h][j]);
        }
    }

    __device__ __forceinline__ void load_value(const E *from, int rows, int D) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const E *row = from + min(own_token(i), rows - 1) * D + 8 * quad();
#pragma unroll
            for (int j = 0; j < kWidth / 64; ++j) load_vector(row + 64 * j, 64 * j + 8 * quad() < D, value[i][j]);
        }
    }

    __device__ __forceinline__ void multiply_keys(const Query &query, float (&logit)[4]) const {
        float sum[2][4] = {};
#pragma unroll
        for (int n = 0; n < kWidth / 16; ++n) {
            const uint4 asked = query[n][threadIdx.x % kWarp];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t *pair = key[h][n / 2] + n % 2 * 2;
                multiply_as<E>(sum[h], {asked.x, asked.y, asked.z, asked.w}, {pair[0], pair[1]});
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) logit[i] = sum[i / 2][i % 2];
    }

    __device__ __forceinline__ void add_values(const float (&weight)[4], unsigned seen, Sums<kWidth> &sums) {
        if (seen != (1u << kTile) - 1) {
            // Values of masked tokens may be NaN, and 0 · NaN is NaN.
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int n = 0; n < kWidth / 16; ++n)
                    if (!(seen >> own_token(i) & 1)) value[i][n / 4][n % 4] = 0;
        }
        E high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            from_float(weight[i], &high[i]);
            from_float(weight[i] - to_float(high[i]), &low[i]);
        }
        const uint32_t coarse[2] = {pack(high[0], high[1]), pack(high[2], high[3])};
        const uint32_t fine[2] = {pack(low[0], low[1]), pack(low[2], low[3])};
#pragma unroll
        for (int j = 0; j < kWidth / 64; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const unsigned halves = e % 2 ? 0x7632 : 0x5410;  // of elements e and e + 4, for two tokens at a time
                uint32_t pairs[4];
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    pairs[n] = __byte_perm(value[n / 2 * 2][j][e / 2 + n % 2 * 2],
                                           value[n / 2 * 2 + 1][j][e / 2 + n % 2 * 2], halves);
                multiply_as<E>(sums[j][e], pairs, coarse);
                multiply_as<E>(sums[j][e], pairs, fine);
            }
        }
    }
};

// fp32 keys and values are read where they are used; lanes that use the same ones hit the L1 cache.
template <int kWidth>
struct Tile<float, kWidth> {
    struct Query {};
    const float *asked, *key, *value;
    int rows, head_dim;

    __device__ __forceinline__ void load_query(const float *from, int D, Query &) { asked = from, head_dim = D; }
    __device__ __forceinline__ void load_key(const float *from, int count, int) { key = from, rows = count; }
    __device__ __forceinline__ void load_value(const float *from, int, int) { value = from; }

    __device__ __forceinline__ void multiply_keys(const Query &, float (&logit)[4]) const {
        const float *row[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            row[i] = key + min(own_token(i), rows - 1) * head_dim;
            logit[i] = 0.f;
        }
#pragma unroll 4
        for (int d = 0; d < head_dim; d += 4) {
            const float4 by = *reinterpret_cast<const float4 *>(asked + d);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 found = *reinterpret_cast<const float4 *>(row[i] + d);
                logit[i] = fmaf(by.x, found.x, logit[i]);
                logit[i] = fmaf(by.y, found.y, logit[i]);
                logit[i] = fmaf(by.z, found.z, logit[i]);
                logit[i] = fmaf(by.w, found.w, logit[i]);
            }
        }
    }

    __device__ __forceinline__ void add_values(const float (&weight)[4], unsigned seen, Sums<kWidth> &sums) {
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            const int i = t % 2 + 2 * (t / 8), from = 8 * in_quad() + t % 8 / 2;
            const float of_heads[2] = {__shfl_sync(kAll, weight[i], from), __shfl_sync(kAll, weight[i], from + 4)};
            if (!(seen >> t & 1)) continue;
#pragma unroll
            for (int n = 0; n < kWidth / 32; ++n) {
                const int d = n / 2 * 64 + 8 * quad() + n % 2 * 4;
                if (d >= head_dim) continue;
                const float4 found = *reinterpret_cast<const float4 *>(value + t * head_dim + d);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    sums[n / 2][0][n % 2 * 2 + h] = fmaf(of_heads[h], found.x, sums[n / 2][0][n % 2 * 2 + h]);
                    sums[n / 2][1][n % 2 * 2 + h] = fmaf(of_heads[h], found.y, sums[n / 2][1][n % 2 * 2 + h]);
                    sums[n / 2][2][n % 2 * 2 + h] = fmaf(of_heads[h], found.z, sums[n / 2][2][n % 2 * 2 + h]);
                    sums[n / 2][3][n % 2 * 2 + h] = fmaf(of_heads[h], found.w, sums[n / 2][3][n % 2 * 2 + h]);
                }
            }
        }
    }
};

// A thread block's work: a part of a row's slots, for some query heads.
struct Work {
    int sequence, row, head0, heads;  // row and first head, counted over all sequences
    int split, splits, rank, ranks;   // the warp's rank among those of the row; splits and ranks are powers of two
    int tokens, head_dim, slots;

    __device__ __forceinline__ explicit Work(const SparseDecode &a) {
        splits = static_cast<int>(a.splits);
        split = blockIdx.x & (splits - 1);
        rank = threadIdx.x / kWarp * splits + split;  // spreads few slots over many thread blocks
        ranks = kWarps * splits;
        sequence = blockIdx.z;
        row = sequence * static_cast<int>(a.kv_heads) + blockIdx.y;
        tokens = static_cast<int>(a.tokens);
        head_dim = static_cast<int>(a.head_dim);
        slots = static_cast<int>(a.slots);
        const int first = (blockIdx.x >> (__ffs(splits) - 1)) * kHeads;
        heads = min(kHeads, static_cast<int>(a.group) - first);
        head0 = row * static_cast<int>(a.group) + first;
    }
};

__device__ __forceinline__ void write_scores(const SparseDecode &a, const Work &work, int m, int slot, float peak, float sum) {
    const int64_t at = static_cast<int64_t>(work.head0 + m) * work.slots + slot;
    a.peak[at] = peak;
    a.sum[at] = sum;
}

__device__ __forceinline__ const int64_t *blocks_of(const SparseDecode &a, const Work &work) {
    return a.block + static_cast<int64_t>(work.row) * work.slots;
}

// Writes the scores of inactive slots, 32 consecutive ones per warp.
__device__ __forceinline__ void write_inactive(const SparseDecode &a, const Work &work) {
    for (int slot = work.rank * kWarp + threadIdx.x % kWarp; slot < work.slots; slot += work.ranks * kWarp)
        if (blocks_of(a, work)[slot] < 0)
#pragma unroll 1
            for (int m = 0; m < work.heads; ++m) write_scores(a, work, m, slot, -INFINITY, -INFINITY);
}

// Lists this warp's active slots from `begin` on, and returns their number. All warps of a row count active slots the same way
// and take them in turn, so that the work is balanced wherever the active slots are.
__device__ __forceinline__ int list_slots(const SparseDecode &a, const Work &work, int begin, Place *list) {
    constexpr int kTogether = 4;
    const int lane = threadIdx.x % kWarp, shift = __ffs(work.ranks) - 1;
    const int end = min(begin + kListed, work.slots);
    int active = 0;
    for (int first = begin; first < end; first += kTogether * kWarp) {
        int found[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int slot = first + i * kWarp + lane;
            found[i] = slot < end ? static_cast<int>(blocks_of(a, work)[slot]) : -1;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if (first + i * kWarp >= end) break;
            const int slot = first + i * kWarp + lane;
            const unsigned all = __ballot_sync(kAll, found[i] >= 0);
            const int number = active + __popc(all & ((1u << lane) - 1));
            if (found[i] >= 0 && (number & (work.ranks - 1)) == work.rank) list[number >> shift] = {slot, found[i]};
            active += __popc(all);
        }
    }
    __syncwarp();
    return (active - work.rank + work.ranks - 1) >> shift;
}

// Tokens that the newest one may see: from `first` to before `end`.
struct Visible {
    int first = 0, end = 0;

    Visible() = default;
    __device__ __forceinline__ Visible(const SparseDecode &a, int sequence) {
        end = static_cast<int>(a.length_B ? a.length_B[sequence] : a.length);
        const int padding = a.padding ? static_cast<int>(a.padding[sequence]) : 0;
        const int window = static_cast<int>(a.window), chunk = static_cast<int>(a.chunk);
        first = padding;
        if (window) first = max(first, end - window);
        if (chunk) first = max(first, padding + (end - 1 - padding) / chunk * chunk);  // chunks begin after the padding
    }
};

// Whether the token of this lane (of the first 16) is visible and not padding.
__device__ __forceinline__ uint8_t is_real(const SparseDecode &a, const Work &work, Visible visible, int block, int part) {
    const int offset = part * kTile + threadIdx.x % kWarp, token = block * work.tokens + offset;
    if (offset >= min(work.tokens, (part + 1) * kTile) || token < visible.first || token >= visible.end) return 0;
    return a.real ? a.real[work.sequence * a.length + token] : 1;
}

// The splits' partial results of a head: D sums, then the largest logit and the sum of weights.
__device__ __forceinline__ float *partials_of(const SparseDecode &a, const Work &work, int m) {
    return a.partial + static_cast<int64_t>(work.head0 + m) * work.splits * (work.head_dim + 4);
}

// Merges the warps of this thread block into its partial result.
template <int kWidth>
__device__ __forceinline__ void merge_warps(const SparseDecode &a, const Work &work, float top, float total,
                                            const Sums<kWidth> &sums) {
    __shared__ float4 part[kWarps][kHeads][kWidth / 4];
    __shared__ float part_top[kHeads][kWarps], part_total[kHeads][kWarps];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int n = 0; n < kWidth / 32; ++n) {
            const int i = n % 2 * 2 + h;
            part[warp][2 * in_quad() + h][n / 2 * 16 + 2 * quad() + n % 2] =
                make_float4(sums[n / 2][0][i], sums[n / 2][1][i], sums[n / 2][2][i], sums[n / 2][3][i]);
        }
    }
    if (in_quad() == 0) {
        part_top[quad()][warp] = top;
        part_total[quad()][warp] = total;
    }
    __syncthreads();
    for (int m = warp; m < work.heads; m += kWarps) {
        float now = -INFINITY, worth[kWarps], sum = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) now = fmaxf(now, part_top[m][w]);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            worth[w] = expf(part_top[m][w] - origin(now));
            sum += worth[w] * part_total[m][w];
        }
        float *partial = partials_of(a, work, m) + work.split * (work.head_dim + 4);
        for (int d = 4 * lane; d < work.head_dim; d += 4 * kWarp) {
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) add_scaled(worth[w], part[w][m][d / 4], x);
            *reinterpret_cast<float4 *>(partial + d) = x;
        }
        if (lane == 0) *reinterpret_cast<float2 *>(partial + work.head_dim) = make_float2(now, sum);
    }
}

// Whether this thread block is the last of its row's splits to arrive; then it sees the others' writes.
__device__ __forceinline__ bool arrives_last(const SparseDecode &a, const Work &work) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = add_in_order(a.arrived + work.head0, 1) == work.splits - 1;
        if (last) a.arrived[work.head0] = 0;  // for the next launch
    }
    __syncthreads();
    return last;
}

// Merges the partial results of a row, and the sink.
template <typename E>
__device__ __forceinline__ void merge_splits(const SparseDecode &a, const Work &work) {
    constexpr int kHeld = 8;
    __shared__ float worth_of[kWarps][kMaxSplits];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, D = work.head_dim, width = D + 4, splits = work.splits;
    float *worth = worth_of[warp];
    for (int m = warp; m < work.heads; m += kWarps) {
        const int head = work.head0 + m;
        const float *partials = partials_of(a, work, m);
        float4 held[kHeld];
        const auto hold = [&](int first, int d) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i)
                if (first + i < splits && d < D) held[i] = __ldcg(reinterpret_cast<const float4 *>(partials + (first + i) * width + d));
        };
        hold(0, 4 * lane);  // before their weights are known, so that both loads overlap
        float2 found[kMaxSplits / kWarp];
        float now = a.sinks ? a.sinks[head % (a.kv_heads * a.group)] : -INFINITY;
        const float sink = now;
#pragma unroll
        for (int i = 0; i < kMaxSplits / kWarp; ++i) {
            const int s = i * kWarp + lane;
            found[i] = s < splits ? __ldcg(reinterpret_cast<const float2 *>(partials + s * width + D)) : make_float2(-INFINITY, 0.f);
            now = fmaxf(now, found[i].x);
        }
        now = warp_max(now);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kMaxSplits / kWarp; ++i) sum += expf(found[i].x - origin(now)) * found[i].y;
        sum = warp_sum(sum) + expf(sink - origin(now));
#pragma unroll
        for (int i = 0; i < kMaxSplits / kWarp; ++i) worth[i * kWarp + lane] = expf(found[i].x - origin(now)) / sum;
        if (lane == 0) a.lse[head] = origin(now) + logf(sum);
        __syncwarp();
        for (int d = 4 * lane; d < D; d += 4 * kWarp) {
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
            for (int first = 0; first < splits; first += kHeld) {
                if (first || d >= 4 * kWarp) hold(first, d);
#pragma unroll
                for (int i = 0; i < kHeld; ++i)
                    if (first + i < splits) add_scaled(worth[first + i], held[i], x);
            }
            E *out = static_cast<E *>(a.out) + static_cast<int64_t>(head) * D + d;
            from_float(x.x, out);
            from_float(x.y, out + 1);
            from_float(x.z, out + 2);
            from_float(x.w, out + 3);
        }
        __syncwarp();
    }
}

template <typename E, int kWidth, bool kValues>
__device__ __forceinline__ void attend_slots(const SparseDecode &a) {
    __shared__ Place listed[kWarps][kListed / kWarps];
    __shared__ typename Tile<E, kWidth>::Query query;
    const Work work(a);
    Place *list = listed[threadIdx.x / kWarp];
    const int D = work.head_dim;
    const int parts = (work.tokens + kTile - 1) / kTile;
    const float scaling = static_cast<float>(a.scaling), softcap = static_cast<float>(a.softcap);
    const int64_t row_offset = static_cast<int64_t>(work.row) * work.slots * work.tokens * D;
    const E *keys = static_cast<const E *>(a.key) + row_offset, *values = static_cast<const E *>(a.value) + row_offset;

    // With fewer than kHeads heads, the last one is repeated.
    const E *asked = static_cast<const E *>(a.query) + static_cast<int64_t>(work.head0 + min(quad(), work.heads - 1)) * D;

    Tile<E, kWidth> tile;
    Sums<kWidth> sums = {};
    Visible visible;
    float top = -INFINITY, total = 0.f;  // of this lane's head: largest logit so far, and weights relative to it
    for (int begin = 0; begin < work.slots; begin += kListed) {
        const int count = list_slots(a, work, begin, list);
        const auto offset = [&](int entry, int part) { return (list[entry].slot * work.tokens + part * kTile) * D; };
        const auto rows = [&](int part) { return min(kTile, work.tokens - part * kTile); };
        if (count > 0) {
            tile.load_key(keys + offset(0, 0), rows(0), D);
            if constexpr (kValues) tile.load_value(values + offset(0, 0), rows(0), D);
        }
        if (begin == 0) {
            // Issued after the slow loads, since it is needed later.
            visible = Visible(a, work.sequence);
            tile.load_query(asked, D, query);
            write_inactive(a, work);
            __syncthreads();
        }
        uint8_t real = count > 0 ? is_real(a, work, visible, list[0].block, 0) : 0;
        float slot_peak = -INFINITY, slot_sum = 0.f;
        for (int entry = 0, part = 0; entry < count;) {
            const bool first = part == 0, last = part == parts - 1;
            float logit[4];
            tile.multiply_keys(query, logit);
            const unsigned seen = __ballot_sync(kAll, real != 0);
            part = last ? 0 : part + 1;
            entry += last;
            if (entry < count) {
                tile.load_key(keys + offset(entry, part), rows(part), D);
                real = is_real(a, work, visible, list[entry].block, part);
            }

            // No fused multiply-add here: a slot's scores are then the same with values and without.
#pragma unroll
            for (int i = 0; i < 4; ++i) logit[i] = __fmul_rn(logit[i], scaling);
            if (softcap != 0.f) {
#pragma unroll
                for (int i = 0; i < 4; ++i) logit[i] = __fmul_rn(softcap, tanhf(logit[i] / softcap));
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (!(seen >> own_token(i) & 1)) logit[i] = -INFINITY;
            const float peak = quad_max(fmaxf(fmaxf(logit[0], logit[1]), fmaxf(logit[2], logit[3])));
            float weight[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) weight[i] = expf(logit[i] - origin(peak));
            const float sum = quad_sum(weight[0] + weight[1] + weight[2] + weight[3]);
            if (first) {
                slot_peak = peak;
                slot_sum = sum;
            } else {
                const float before = slot_peak;
                slot_peak = fmaxf(before, peak);
                slot_sum = __fmul_rn(slot_sum, expf(before - origin(slot_peak))) + __fmul_rn(sum, expf(peak - origin(slot_peak)));
            }
            if (last && in_quad() == 0 && quad() < work.heads)
                write_scores(a, work, quad(), list[entry - 1].slot, slot_peak, origin(slot_peak) + logf(slot_sum));

            if constexpr (kValues) {
                const float now = fmaxf(top, peak), shrink = expf(top - origin(now)), worth = expf(peak - origin(now));
                top = now;
                total = total * shrink + sum * worth;
#pragma unroll
                for (int i = 0; i < 4; ++i) weight[i] *= worth;
                const float of_heads[2] = {__shfl_sync(kAll, shrink, 8 * in_quad()), __shfl_sync(kAll, shrink, 8 * in_quad() + 4)};
#pragma unroll
                for (int n = 0; n < kWidth / 4; ++n) sums[n / 16][n / 4 % 4][n % 4] *= of_heads[n % 2];
                tile.add_values(weight, seen, sums);
                if (entry < count) tile.load_value(values + offset(entry, part), rows(part), D);
            }
        }
        __syncwarp();
    }
    if constexpr (kValues) {
        merge_warps<kWidth>(a, work, top, total, sums);
        if (arrives_last(a, work)) merge_splits<E>(a, work);
    }
}

}  // namespace
