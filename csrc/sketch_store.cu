// Quantises keys to the few-bit codes of a sketch: whole groups of a prompt, or one token, which may complete a group. The same
// as `quantise` and `pack` (predictor/quantise.py), except for the order of sums.
//
// Four lanes share a channel, each with 16 tokens in registers. A lane's tokens are those whose codes share bytes, so that no two
// lanes write the same byte. A warp takes 8 channels of one width at a time.

#include "device.cuh"
#include "sketch.h"

namespace {

using namespace device;

constexpr int kGroup = 64;    // tokens
constexpr int kOwn = 16;      // tokens of a lane
constexpr int kChannels = 8;  // of a warp
constexpr int kWarps = 8;     // of a thread block, which takes a group
constexpr float kLargest = 65504.f;

template <typename Reduce>
__device__ __forceinline__ float over_channel(float x, const Reduce &reduce) {
    x = reduce(x, __shfl_xor_sync(kAll, x, 1));
    return reduce(x, __shfl_xor_sync(kAll, x, 2));
}

__device__ __forceinline__ float channel_sum(float x) {
    return over_channel(x, [](float a, float b) { return a + b; });
}

__device__ __forceinline__ float inside(float x) { return fminf(fmaxf(x, -kLargest), kLargest); }

__device__ __forceinline__ uint16_t half_bits(float x) {
    __half y;
    from_float(x, &y);
    uint16_t bits;
    memcpy(&bits, &y, 2);
    return bits;
}

__device__ __forceinline__ float rounded_to_half(float x) {
    __half y;
    from_float(x, &y);
    return to_float(y);
}

// The nearest codes; all 0 if half precision rounds the scale to 0.
template <int kTop>
struct Nearest {
    float zero, inverse;
    __device__ Nearest(float zero, float scale) : zero(zero), inverse(scale > 0x1p-25f ? 1.f / scale : 0.f) {}
    __device__ float operator()(float key) const { return fminf(fmaxf(rintf((key - zero) * inverse), 0.f), float(kTop)); }
};

// Quantises a channel to codes of `kBits`. `key` points to its element of the group's first token, `stride` is the distance of
// tokens; `codes` points to its byte in the group's first row of `channels` bytes. Lanes that are not `wanted` write nothing.
template <int kBits, typename E>
__device__ void store_channel(const E *key, int stride, bool wanted, uint16_t *zero_to, uint16_t *scale_to, uint8_t *codes,
                              int channels) {
    constexpr int kTop = (1 << kBits) - 1, kRows = 2 * kBits, kPlanes = 8 / kBits;  // kRows: of a lane
    const int part = threadIdx.x % 4;
    float x[kOwn], low = INFINITY, high = -INFINITY;
    key += part * kRows * stride;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] = inside(to_float(key[(i / kRows * 4 * kRows + i % kRows) * stride]));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    low = over_channel(low, [](float a, float b) { return fminf(a, b); });
    high = over_channel(high, [](float a, float b) { return fmaxf(a, b); });

    // Choose the best of a few ranges around the centre.
    const float centre = low / 2 + high / 2, half = high / 2 - low / 2;
    float zero = centre - half, scale = half * (2.f / kTop);
    if (kBits == 2) {
        float error = INFINITY;
#pragma unroll
        for (const float share : {1.f, 0.8f, 0.6f}) {
            const float trial_zero = centre - share * half, trial_scale = half * (2 * share / kTop);
            const Nearest<kTop> nearest(trial_zero, trial_scale);
            float trial = 0.f;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const float off = fmaf(trial_scale, nearest(x[i]), trial_zero) - x[i];
                trial = fmaf(off, off, trial);
            }
            trial = channel_sum(trial);
            if (trial < error) {
                zero = trial_zero;
                scale = trial_scale;
                error = trial;
            }
        }
    }

    // Least-squares fit of key = zero + scale · code over the tokens.
    const Nearest<kTop> first(zero, scale);
    float key_mean = 0.f, code_mean = 0.f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        key_mean += x[i];
        code_mean += first(x[i]);
    }
    key_mean = channel_sum(key_mean) / kGroup;
    code_mean = channel_sum(code_mean) / kGroup;
    float variance = 0.f, covariance = 0.f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const float offset = first(x[i]) - code_mean;
        variance = fmaf(offset, offset, variance);
        covariance = fmaf(x[i] - key_mean, offset, covariance);
    }
    variance = channel_sum(variance);
    covariance = channel_sum(covariance);
    scale = variance > 0.f ? fminf(fmaxf(covariance / variance, 0.f), kLargest) : 0.f;
    zero = inside(key_mean - scale * code_mean);
    if (!wanted) return;
    if (part == 0) {
        *zero_to = half_bits(zero);
        *scale_to = half_bits(scale);
    }
    // Choose codes for the rounded scale and zero, to minimise the effect of their rounding.
    const Nearest<kTop> last(rounded_to_half(zero), rounded_to_half(scale));
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        uint32_t byte = 0;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
            byte |= static_cast<uint32_t>(last(x[plane * kRows + row])) << kBits * plane;
        codes[(part * kRows + row) * channels] = static_cast<uint8_t>(byte);
    }
}

// Stores only the mean of a channel.
template <typename E>
__device__ void store_mean(const E *key, int stride, bool wanted, uint16_t *zero_to) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += inside(to_float(key[(threadIdx.x % 4 + 4 * i) * stride]));
    sum = channel_sum(sum);
    if (wanted && threadIdx.x % 4 == 0) *zero_to = half_bits(sum / kGroup);
}

// A thread block takes groups of rows in turn. To append a token, it takes the row's last group, which is usually not full.
template <typename E>
__device__ __forceinline__ void store_groups(const SketchStore &a) {
    const Sketch &s = a.sketch;
    const int D = static_cast<int>(s.head_dim), coded = static_cast<int>(s.coded), wide = static_cast<int>(s.wide_channels);
    for (int64_t item = blockIdx.x; item < s.batch * s.kv_heads * a.groups; item += gridDim.x) {
        const int64_t row = item / a.groups;
        int64_t group = item % a.groups;
        int stride = static_cast<int>(a.of_token);
        const E *key = static_cast<const E *>(a.key) + row / s.kv_heads * a.of_batch + row % s.kv_heads * a.of_head;
        if (a.append) {
            const int64_t token = (a.length_B ? a.length_B[row / s.kv_heads] : a.length) - 1;
            E *tail = static_cast<E *>(s.tail) + row * kGroup * D;
            for (int d = threadIdx.x; d < D; d += blockDim.x) tail[token % kGroup * D + d] = key[d];
            if ((token + 1) % kGroup) continue;
            __syncthreads();
            group = token / kGroup;
            key = tail;
            stride = D;
        } else {
            key += group * kGroup * a.of_token;
            group += a.first;
        }

        const int64_t at = row * s.capacity + group;
        const int64_t *order = s.order + row * D;
        const int first = threadIdx.x / kWarp * kChannels;  // of this warp's
#pragma unroll 1
        for (int narrow = 0; narrow < 2; ++narrow) {
            const int begin = narrow ? wide : 0, end = narrow ? coded : wide, channels = end - begin;
            const int bits = static_cast<int>(narrow ? s.bits : s.wide_bits);
            uint8_t *codes = (narrow ? s.narrow : s.wide) + at * (kGroup / 8 * bits * channels);
            for (int i = first; i < channels; i += kWarps * kChannels) {
                const int wanted = i + threadIdx.x % kWarp / 4, own = min(wanted, channels - 1), c = begin + own;
                const E *from = key + order[c];
                uint16_t *zero = s.zero + at * D + c, *scale = s.scale + at * coded + c;
                if (bits == 1) store_channel<1>(from, stride, wanted == own, zero, scale, codes + own, channels);
                else if (bits == 2) store_channel<2>(from, stride, wanted == own, zero, scale, codes + own, channels);
                else if (bits == 4) store_channel<4>(from, stride, wanted == own, zero, scale, codes + own, channels);
                else store_channel<8>(from, stride, wanted == own, zero, scale, codes + own, channels);
            }
        }
        for (int i = coded + first; i < D; i += kWarps * kChannels) {
            const int wanted = i + threadIdx.x % kWarp / 4, c = min(wanted, D - 1);
            store_mean(key + order[c], stride, wanted == c, s.zero + at * D + c);
        }
    }
}

}  // namespace
