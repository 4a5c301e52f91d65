// Scores of every block for one query, by the few-bit keys of a sketch: one pass over them, bound by memory bandwidth.
//
// A warp takes one group of tokens at a time, with codes, scales and zeros in registers; it loads the next group while it
// finishes the current one. Tensor cores compute the products: 16 tokens × 16 channels of codes, times 16 channels × 8 columns
// of query times scale.
//   Codes need no conversion. Masked out of their bytes and spread to 16 bits, they are subnormal half-precision numbers:
// code · 2^(bits · plane − 24), with `pack`'s planes (predictor/quantise.py). Bytes 0 and 2 of a word form one register of the
// matrix, 1 and 3 another, as the order of channels in a sum is free.
//   Half precision is too coarse for query times scale, so each of 4 heads has two columns: the rounded product, and the
// rounding error. Their sum has 22 bits.

#include "device.cuh"
#include "sketch.h"

namespace {

using namespace device;

constexpr int kGroup = 64;      // tokens
constexpr int kTiles = 4;       // of 16 tokens in a group
constexpr int kOcts = 8;        // of 8 tokens in a group, two a tile
constexpr int kTogether = 4;    // heads of one product
constexpr int kMaxHeads = 8;   // query heads of a KV head in one thread block
constexpr int kWarps = 4;       // of a thread block
constexpr int kSubnormal = 24;  // the integer n, as bits of a half-precision number, is n · 2^-24
constexpr int kLogitRow = kGroup + 8;

// Wide codes have small scales, so query times scale is multiplied by this power of two. It is the largest that never overflows:
// keys are within ±65504, and a scale is at most 1.4 times their range divided by the largest code.
__host__ __device__ constexpr int lift(int bits) { return bits == 8 ? 6 : bits == 4 ? 2 : 0; }

template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&to)[kWords], const void *from) {
    if constexpr (kWords >= 4) {
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
            const uint4 four = __ldcs(static_cast<const uint4 *>(from) + i);
            to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
        }
    } else if constexpr (kWords == 2) {
        const uint2 two = __ldcs(static_cast<const uint2 *>(from));
        to[0] = two.x, to[1] = two.y;
    } else {
        to[0] = __ldcs(static_cast<const uint32_t *>(from));
    }
}

// A lane's part of a group's channels of one width: kWords · 4 channels of every eighth row of codes. Four lanes share a row, and
// a warp reads eight rows at once, which are contiguous.
template <int kBits, int kWords>
struct Codes {
    uint32_t word[kBits][kWords];  // 4 channels each
    uint32_t scale[2 * kWords];    // 2 each
    const uint8_t *codes_at;       // next codes to load
    const uint16_t *scales_at;
    int channels, first;           // of all lanes; of this one

    __device__ Codes(const uint8_t *codes, const uint16_t *scales, int channels, int lane)
        : channels(channels), first(lane % 4 * 4 * kWords) {
        codes_at = codes + lane / 4 * channels + first;
        scales_at = scales + first;
    }

    __device__ __forceinline__ void skip(int groups, int all_channels) {
        codes_at += static_cast<int64_t>(groups) * (8 * kBits * channels);
        scales_at += static_cast<int64_t>(groups) * all_channels;
    }

    // Missing channels are zeros.
    __device__ __forceinline__ void load() {
        if (channels == 16 * kWords) {
#pragma unroll
            for (int i = 0; i < kBits; ++i) load_words(word[i], codes_at + 8 * i * (16 * kWords));
            load_words(scale, scales_at);
            return;
        }
        // The number of channels is even; no further alignment is guaranteed.
#pragma unroll
        for (int w = 0; w < 2 * kWords; ++w) {
            const bool there = first + 2 * w < channels;
            scale[w] = there ? *reinterpret_cast<const uint32_t *>(scales_at + 2 * w) : 0;
#pragma unroll
            for (int i = 0; i < kBits; ++i) {
                const uint32_t two = there ? *reinterpret_cast<const uint16_t *>(codes_at + 8 * i * channels + 2 * w) : 0;
                word[i][w / 2] = w % 2 ? word[i][w / 2] | two << 16 : two;
            }
        }
    }

    // sum[i] += codes of tile i · query times scale, as `device::multiply` has them; the query is this lane's part.
    __device__ __forceinline__ void multiply(float (&sum)[kTiles][4], const uint4 *query, uint32_t mask) const {
        constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x10001u;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const uint4 pairs = query[8 * w];
            const uint32_t even = __byte_perm(scale[2 * w], scale[2 * w + 1], 0x5410);
            const uint32_t odd = __byte_perm(scale[2 * w], scale[2 * w + 1], 0x7632);
            const uint32_t b[2] = {column(pairs.x, pairs.z, even, mask), column(pairs.y, pairs.w, odd, mask)};
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                // The tokens of oct o are in rows o % kBits · 8 and up, in plane o / kBits.
                const uint32_t top = word[2 * i % kBits][w], top_mask = kMask << 2 * i / kBits * kBits;
                const uint32_t bottom = word[(2 * i + 1) % kBits][w], bottom_mask = kMask << (2 * i + 1) / kBits * kBits;
                const uint32_t a[4] = {top & top_mask, bottom & bottom_mask, top >> 8 & top_mask, bottom >> 8 & bottom_mask};
                device::multiply(sum[i], a, b);
            }
        }
    }

    // The remaining factor of a sum, for the tokens of an oct.
    static __device__ constexpr float of_plane(int oct) {
        return 1.f / static_cast<float>(1 << (oct / kBits * kBits + lift(kBits)));
    }

private:
    static __device__ __forceinline__ __half2 halves(uint32_t bits) {
        __half2 x;
        memcpy(&x, &bits, 4);
        return x;
    }

    // A head's first column has the rounded product; its second, where `mask` is all ones, has the rounding error.
    static __device__ __forceinline__ uint32_t column(uint32_t upper, uint32_t lower, uint32_t scales, uint32_t mask) {
        const __half2 by = halves(scales), minus_first = __hmul2(halves((upper ^ 0x80008000u) & mask), by);
        const __half2 x = __hfma2(halves(lower), by, __hfma2(halves(upper), by, minus_first));
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return bits;
    }
};

// No channels of that width.
template <int kWords>
struct Codes<0, kWords> {
    __device__ Codes(const uint8_t *, const uint16_t *, int, int) {}
    __device__ void skip(int, int) {}
    __device__ void load() {}
};

__device__ __forceinline__ float to_number(uint32_t bits, int64_t element) {
    if (element == kBFloat16) return __uint_as_float(bits << 16);
    if (element == kFloat32) return __uint_as_float(bits);
    const auto low = static_cast<uint16_t>(bits);
    __half x;
    memcpy(&x, &low, 2);
    return to_float(x);
}

__device__ __forceinline__ float load_number(const void *from, int64_t index, int64_t element) {
    if (element == kFloat32) return static_cast<const float *>(from)[index];
    return to_number(static_cast<const uint16_t *>(from)[index], element);
}

__device__ __forceinline__ void load_eight(const void *from, int64_t index, int64_t element, float (&to)[8]) {
    const bool full = element == kFloat32;
    const auto *at = reinterpret_cast<const uint4 *>(static_cast<const char *>(from) + index * (full ? 4 : 2));
    const uint4 front = at[0], back = full ? at[1] : make_uint4(0, 0, 0, 0);
    const uint32_t word[8] = {front.x, front.y, front.z, front.w, back.x, back.y, back.z, back.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_number(full ? word[i] : word[i / 2] >> i % 2 * 16 & 0xffffu, element);
}

// The queries of one thread block's heads, channels in the sketch's order; zeros for missing heads and channels.
template <int kWideWords, int kWords, int kMaxDim>
struct Queries {
    // For products with codes: relative to a power of two above the head's largest element, each as the sum of two
    // half-precision numbers. For a word of codes and each of a head's two columns, the operands of the four lanes of a row:
    // the upper halves of channels 0, 2, 1, 3, then the lower halves, the first column's rounding error.
    uint4 pairs[kMaxHeads][kWideWords + kWords][2][4];
    float4 ranked[kMaxHeads / kTogether][kMaxDim / 4][kTogether];  // for products with zeros: times the scaling
    float unit[kMaxHeads];                                          // factor of a sum over codes

    template <int kBits, int kWideBits>
    __device__ void prepare(const SketchScores &a, int64_t row, uint32_t head0, int heads) {
        constexpr int kParts = (kMaxDim + kWarp - 1) / kWarp;
        const int lane = threadIdx.x % kWarp, D = static_cast<int>(a.sketch.head_dim);
        const int wide = static_cast<int>(a.sketch.wide_channels), coded = static_cast<int>(a.sketch.coded);
        const int64_t *order = a.sketch.order + row * D;
        for (int m = threadIdx.x / kWarp; m < (heads + kTogether - 1) / kTogether * kTogether; m += kWarps) {
            for (int i = lane; i < 8 * (kWideWords + kWords); i += kWarp) (&pairs[m][0][0][0])[i] = make_uint4(0, 0, 0, 0);
            float x[kParts], largest = 0.f;
#pragma unroll
            for (int i = 0; i < kParts; ++i) {
                const int c = lane + i * kWarp;
                const int64_t at = static_cast<int64_t>(head0 + m) * D;
                x[i] = m < heads && c < D ? load_number(a.query, at + order[c], a.sketch.element) : 0.f;
                largest = fmaxf(largest, fabsf(x[i]));
            }
            // 2^exponent is above it, clamped so that all powers of two used here are normal numbers.
            const int exponent = min(max(__float_as_int(warp_max(largest)) >> 23, 1), 228) - 126;
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kParts; ++i) {
                const int c = lane + i * kWarp;
                if (c >= kMaxDim) continue;
                auto *quad = reinterpret_cast<float *>(&ranked[m / kTogether][c / 4][m % kTogether]);
                quad[c % 4] = x[i] * static_cast<float>(a.scaling);
                if (c >= coded) continue;
                const bool many = c < wide;
                const int place = many ? c : c - wide, words = many ? kWideWords : kWords;
                const float relative = x[i] * power_of_two((many ? lift(kWideBits) : lift(kBits)) - exponent);
                __half upper, lower;
                from_float(relative, &upper);
                from_float(relative - to_float(upper), &lower);
                uint4(&word)[2][4] = pairs[m][(many ? 0 : kWideWords) + place / 4 % words];
                const int of_lane = place / 4 / words, half = place % 4 / 2 + place % 2 * 2;
                for (uint4(&column)[4] : word) reinterpret_cast<__half *>(&column[of_lane])[half] = upper;
                reinterpret_cast<__half *>(&word[1][of_lane])[half + 4] = lower;
            }
            if (lane == 0) unit[m] = static_cast<float>(a.scaling) * power_of_two(exponent + kSubnormal);
        }
    }

private:
    static __device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }
};

// Index of a group's token in a row of logits, padded so that `score_blocks` has no bank conflicts.
__device__ __forceinline__ int logit_place(int token) { return token + token / 32 * 4; }

// Peak and log-sum-exp of the blocks of the 64 tokens from `begin` on, from their logits of 4 heads in shared memory.
__device__ __forceinline__ void score_blocks(const SketchScores &a, float *logits, int length, int begin, uint32_t head0,
                                             int heads) {
    constexpr int kOwn = 8;  // tokens of a lane
    constexpr float kLog2E = 1.44269504f;
    const int lane = threadIdx.x % kWarp, m = lane / kOcts, oct = lane % kOcts;
    if (a.softcap != 0) {
        const float softcap = static_cast<float>(a.softcap);
#pragma unroll 1
        for (int i = lane; i < kTogether * kLogitRow; i += kWarp)
            if (logits[i] > -INFINITY) logits[i] = softcap * tanhf(logits[i] / softcap);
        __syncwarp();
    }
    if (a.real != nullptr) {
        for (int token = lane; token < kGroup; token += kWarp) {
            if (begin + token >= length || a.real[blockIdx.z * a.length + begin + token]) continue;
#pragma unroll
            for (int i = 0; i < kTogether; ++i) logits[i * kLogitRow + logit_place(token)] = -INFINITY;
        }
        __syncwarp();
    }
    const auto *own = reinterpret_cast<const float4 *>(logits + m * kLogitRow + logit_place(oct * kOwn));
    const float4 front = own[0], back = own[1];
    const float x[kOwn] = {front.x, front.y, front.z, front.w, back.x, back.y, back.z, back.w};
    const int size = static_cast<int>(a.block_size), shift = __ffs(size) - 1, lanes = size / kOwn;  // lanes of a block
    float peak = x[0];
#pragma unroll
    for (int i = 1; i < kOwn; ++i) peak = fmaxf(peak, x[i]);
    for (int o = 1; o < lanes; o *= 2) peak = fmaxf(peak, __shfl_xor_sync(kAll, peak, o));
    const float from = peak > -INFINITY ? peak : 0.f;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += exp2_approx(fmaf(x[i], kLog2E, -from * kLog2E));
    for (int o = 1; o < lanes; o *= 2) sum += __shfl_xor_sync(kAll, sum, o);
    const int token = begin + oct * kOwn;
    if (m < heads && (oct & (lanes - 1)) == 0 && token < length) {
        const uint32_t blocks = (static_cast<uint32_t>(a.length) + size - 1) >> shift, head = head0 + m;
        const uint64_t at = static_cast<uint64_t>(head) * blocks + (token >> shift);
        a.peak[at] = peak;
        a.sum[at] = from + __logf(sum);
    }
}

// Logits of the exact keys after the last whole group, and -inf for the rest of that group: a warp takes 16 tokens, four lanes
// take two of them. All loads are issued first; `query` is scratch for the heads' queries.
template <int kMaxDim>
__device__ void multiply_tail(const SketchScores &a, float *query, float *logits, int tokens, int64_t row, uint32_t head0,
                              int heads) {
    constexpr int kParts = kMaxDim / 32;  // of 8 channels, in a lane
    const int lane = threadIdx.x % kWarp, D = static_cast<int>(a.sketch.head_dim);
    const int first = threadIdx.x / kWarp * 16 + lane / 4, channel = lane % 4 * 8;
    float key[2][kParts][8];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < kParts; ++i)
            if (channel + 32 * i < D && first + 8 * j < tokens)
                load_eight(a.sketch.tail, (row * kGroup + first + 8 * j) * D + channel + 32 * i, a.sketch.element, key[j][i]);
    for (int i = threadIdx.x; i < heads * D; i += kWarps * kWarp)
        query[i] = load_number(a.query, static_cast<int64_t>(head0) * D + i, a.sketch.element) * static_cast<float>(a.scaling);
    __syncthreads();
#pragma unroll 1
    for (int m = 0; m < heads; ++m) {
        float dot[2] = {};
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            if (channel + 32 * i >= D) continue;
            const auto *own = reinterpret_cast<const float4 *>(query + m * D + channel + 32 * i);
            const float4 front = own[0], back = own[1];
            const float x[8] = {front.x, front.y, front.z, front.w, back.x, back.y, back.z, back.w};
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int c = 0; c < 8; ++c) dot[j] = fmaf(x[c], key[j][i][c], dot[j]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int token = first + 8 * j;
            dot[j] += __shfl_xor_sync(kAll, dot[j], 1);
            dot[j] += __shfl_xor_sync(kAll, dot[j], 2);
            if (lane % 4 == 0) logits[m * kLogitRow + logit_place(token)] = token < tokens ? dot[j] : -INFINITY;
        }
    }
}

// For head sizes up to kMaxDim: a lane holds kWords words of each row of narrow codes, and half as many of wide ones. The first
// thread block of a row takes its tail, the others its groups.
template <int kWideBits, int kBits, int kWords>
__device__ __forceinline__ void score_groups(const SketchScores &a) {
    constexpr int kWideWords = kWideBits ? kWords / 2 : 0;
    constexpr int kMaxDim = kWideBits ? 32 * kWords : 16 * kWords;
    constexpr int kZeros = kMaxDim / 32;  // of 4 channels, in a lane
    __shared__ Queries<kWideWords, kWords, kMaxDim> queries;
    __shared__ float4 logit_rows[kWarps][kTogether * kLogitRow / 4];

    const Sketch &s = a.sketch;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int D = static_cast<int>(s.head_dim), of_group = static_cast<int>(a.heads / s.kv_heads);
    const int pieces = (of_group + kMaxHeads - 1) / kMaxHeads;
    const int kv_head = blockIdx.y / pieces, first_head = blockIdx.y % pieces * kMaxHeads;
    const int heads = min(kMaxHeads, of_group - first_head);
    const int64_t row = blockIdx.z * s.kv_heads + kv_head;
    const uint32_t head0 = row * of_group + first_head;  // over all sequences

    if (blockIdx.x == 0) {
        const int length = static_cast<int>(a.length_B ? a.length_B[blockIdx.z] : a.length), begin = length / kGroup * kGroup;
        if (begin == length) return;
        static_assert(sizeof(queries) >= kMaxHeads * kMaxDim * sizeof(float), "queries of the tail have the same room");
        multiply_tail<kMaxDim>(a, reinterpret_cast<float *>(&queries), reinterpret_cast<float *>(logit_rows), length - begin,
                                   row, head0, heads);
        __syncthreads();
        const int m = warp * kTogether;
        if (m < heads) score_blocks(a, reinterpret_cast<float *>(logit_rows[warp]), length, begin, head0 + m, heads - m);
        return;
    }

    const int coded = static_cast<int>(s.coded), wide_channels = static_cast<int>(s.wide_channels);
    const int step = (gridDim.x - 1) * kWarps;
    int group = (blockIdx.x - 1) * kWarps + warp;
    const int64_t at = row * s.capacity;
    const uint16_t *scales = s.scale + at * coded;
    Codes<kWideBits, kWideWords> wide(s.wide + at * (8 * kWideBits * wide_channels), scales, wide_channels, lane);
    Codes<kBits, kWords> narrow(s.narrow + at * (8 * kBits * (coded - wide_channels)), scales + wide_channels,
                                coded - wide_channels, lane);
    const auto *zeros = reinterpret_cast<const uint2 *>(s.zero + (at + group) * D) + lane / 4;
    uint2 zero[kZeros];
    const auto load = [&] {
        wide.load();
        narrow.load();
#pragma unroll
        for (int i = 0; i < kZeros; ++i) zero[i] = lane / 4 + 8 * i < D / 4 ? __ldcs(zeros + 8 * i) : make_uint2(0, 0);
    };
    wide.skip(group, coded);
    narrow.skip(group, coded);
    const int64_t found = a.length_B ? a.length_B[blockIdx.z] : a.length;  // the load is still pending
    // Speculatively, before the length is known.
    if (group < static_cast<int>(a.length) / kGroup) load();
    queries.template prepare<kBits, kWideBits>(a, row, head0, heads);
    const int length = static_cast<int>(found), groups = length / kGroup;
    __syncthreads();

    const uint32_t mask = lane / 4 % 2 ? 0xffffffffu : 0;
    auto *logits = reinterpret_cast<float *>(logit_rows[warp]);
    for (; group < groups; group += step) {
        for (int m = 0; m < heads; m += kTogether) {
            // A column of the product belongs to head lane / 8; in the sums a lane has head lane % 4.
            const uint4 *query = &queries.pairs[m + lane / 8][0][lane / 4 % 2][lane % 4];
            float sum[kTiles][4] = {};
            if constexpr (kWideBits != 0) {
                wide.multiply(sum, query, mask);
#pragma unroll
                for (int i = 0; i < 4 * kTiles; ++i)
                    sum[i / 4][i % 4] *= Codes<kWideBits, kWideWords>::of_plane(i / 2) / Codes<kBits, kWords>::of_plane(i / 2);
            }
            narrow.multiply(sum, query + 8 * kWideWords, mask);

            float offset = 0.f;
#pragma unroll
            for (int i = 0; i < kZeros; ++i) {
                const float4 ranked = queries.ranked[m / kTogether][lane / 4 + 8 * i][lane % 4];
                const float zeros[4] = {to_number(zero[i].x, kFloat16), to_number(zero[i].x >> 16, kFloat16),
                                        to_number(zero[i].y, kFloat16), to_number(zero[i].y >> 16, kFloat16)};
                offset = fmaf(ranked.x, zeros[0], fmaf(ranked.y, zeros[1], offset));
                offset = fmaf(ranked.z, zeros[2], fmaf(ranked.w, zeros[3], offset));
            }
            if (m + kTogether >= heads && group + step < groups) {
                wide.skip(step, coded);
                narrow.skip(step, coded);
                zeros += static_cast<int64_t>(step) * (D / 4);
                load();
            }
#pragma unroll
            for (int o = 4; o < kWarp; o *= 2) offset += __shfl_xor_sync(kAll, offset, o);

            const float unit = queries.unit[m + lane % 4];
#pragma unroll
            for (int oct = 0; oct < kOcts; ++oct) {
                const float both = sum[oct / 2][oct % 2 * 2] + sum[oct / 2][oct % 2 * 2 + 1];
                logits[lane % 4 * kLogitRow + logit_place(8 * oct + lane / 4)] =
                    fmaf(both, unit * Codes<kBits, kWords>::of_plane(oct), offset);
            }
            __syncwarp();
            score_blocks(a, logits, length, group * kGroup, head0 + m, heads - m);
            __syncwarp();
        }
    }
}

}  // namespace
