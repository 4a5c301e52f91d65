// The candidates' scores for the next step: all four convolutions over blocks in one pass.
//
// A thread block takes a tile of blocks of one KV head, plus a margin at each end for the convolutions after the first. Each
// convolution computes all rows of the tile; one more row at each end becomes wrong, and the rows in the middle are written. A
// row is a block, in fp16 in shared memory, and a tap of a convolution reads the same rows, shifted by one. Tensor cores sum in
// fp32; the residual stream stays in fp32, in the registers of the rows' warp.

#include "device.cuh"
#include "predict.h"

namespace {

using namespace device;

constexpr int kChannels = 14, kInputs = 16;  // channels of the state, padded for the tensor cores
constexpr int kHidden = 32;
constexpr int kFurther = 3;  // convolutions after the first
constexpr int kTaps = 3;
constexpr int kReach = 1 + kFurther;  // blocks to each side that a score depends on
constexpr int kTall = 2, kWide = kHidden / 8;  // matrices of a warp: 16 rows, and 8 channels of the result
constexpr int kRows = 16 * kTall;              // of a warp
constexpr int kStride = kHidden + 8;           // elements of a row: eight rows lie in different banks
constexpr int kSlice = 16 * kHidden;           // weights from 16 inputs of one tap
constexpr int kSlices = kTaps * (kInputs + kFurther * kHidden) / 16;
constexpr int kBiases = (1 + kFurther) * kHidden + kHidden + 1;
constexpr int kLoads = 4;  // 16-byte loads per thread: enough for the state of a thread block's rows and two more

__device__ constexpr int rows_of(int warps) { return kRows * warps; }
__device__ constexpr int outputs_of(int warps) { return rows_of(warps) - 2 * kFurther; }
// Stores two channels of the state; `element` counts from the first row's first channel.
__device__ __forceinline__ void put(__half *rows, int element, int held, int low, int high, float x, float y) {
    const int i = element / kChannels, channel = element % kChannels;
    if (i >= held) return;
    const bool counts = i >= low && i < high;
    auto *to = reinterpret_cast<__half2 *>(rows + i * kStride + channel);
    to[0] = __floats2half2_rn(counts ? x : 0.f, counts ? y : 0.f);
    if (channel == kChannels - 2) to[1] = __floats2half2_rn(0.f, 0.f);  // padding for the tensor cores
}

// sums = bias + convolution of the warp's rows, whose neighbours are read as well.
template <int kParts>  // of 16 channels
__device__ __forceinline__ void convolve(float (&sums)[kTall][kWide][4], const __half *rows, const uint4 *weight,
                                         const float *bias) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int w = 0; w < kWide; ++w)
#pragma unroll
        for (int t = 0; t < kTall; ++t) {
            sums[t][w][0] = sums[t][w][2] = bias[8 * w + lane % 4 * 2];
            sums[t][w][1] = sums[t][w][3] = bias[8 * w + lane % 4 * 2 + 1];
        }
    const __half *mine = rows + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            uint32_t b[kWide][2];
#pragma unroll
            for (int w = 0; w < kWide; w += 2) {
                const uint4 two = weight[((tap * kParts + part) * kWide + w) / 2 * 32 + lane];
                b[w][0] = two.x, b[w][1] = two.y, b[w + 1][0] = two.z, b[w + 1][1] = two.w;
            }
#pragma unroll
            for (int t = 0; t < kTall; ++t) {
                uint32_t a[4];
                load_matrices(a, mine + (16 * t + tap) * kStride + 16 * part);
#pragma unroll
                for (int w = 0; w < kWide; ++w) multiply(sums[t][w], a, b[w]);
            }
        }
}

__device__ __forceinline__ void score_tiles(const PredictBlocks &a) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Weights, then rows and one more at each end, then biases.
    auto *weight = static_cast<uint4 *>(dynamic_shared());
    auto *rows = reinterpret_cast<__half *>(weight) + kSlices * kSlice;
    auto *bias = reinterpret_cast<float *>(rows + (rows_of(warps) + 2) * kStride);

    const int outputs = outputs_of(warps), begin = blockIdx.x * outputs;
    const int end = min(begin + outputs, static_cast<int>(a.columns));
    const int64_t row = blockIdx.z * a.kv_heads + blockIdx.y;
    float *scores = a.scores + row * a.columns;
    const auto [first, last] = range_of(a.candidates, blockIdx.z, static_cast<int>(a.columns));
    if (end <= first || begin >= last) {
        for (int n = begin + threadIdx.x; n < end; n += blockDim.x) scores[n] = -INFINITY;
        return;
    }

    for (int i = threadIdx.x; i < kSlices * kSlice / 8; i += blockDim.x)
        copy_async(weight + i, static_cast<const uint4 *>(a.weight) + i);
    commit_copies();
    // Row i is block origin + i. Blocks that are no candidates count as zero in every convolution. Origin and capacity are even,
    // so 16 bytes that begin in one block and end in the next stay within a head's state.
    const int origin = begin - kReach, held = rows_of(warps) + 2;
    const int low = first - origin, high = last - origin;
    const auto *state = reinterpret_cast<const float4 *>(a.state + (row * a.capacity + origin) * kChannels);
    float4 loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int v = threadIdx.x + k * blockDim.x, i = 4 * v / kChannels, j = (4 * v + 2) / kChannels;
        loaded[k] = i < min(held, high) && j >= low ? state[v] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    for (int i = threadIdx.x; i < kBiases; i += blockDim.x) bias[i] = a.bias[i];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int e = 4 * (threadIdx.x + k * blockDim.x);
        put(rows, e, held, low, high, loaded[k].x, loaded[k].y);
        put(rows, e + 2, held, low, high, loaded[k].z, loaded[k].w);
    }
    wait_copies<0>();
    __syncthreads();

    bool counts[kTall][2];  // this lane's rows among the warp's: 16 t + lane / 4, and 8 further
#pragma unroll
    for (int t = 0; t < kTall; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = 1 + warp * kRows + 16 * t + 8 * r + lane / 4;
            counts[t][r] = i >= low && i < high;
        }
    const __half *read = rows + warp * kRows * kStride;  // from the row before the warp's first
    float hidden[kTall][kWide][4] = {}, sums[kTall][kWide][4];
    convolve<kInputs / 16>(sums, read, weight, bias);
    for (int layer = 0;; ++layer) {
#pragma unroll
        for (int t = 0; t < kTall; ++t)
#pragma unroll
            for (int w = 0; w < kWide; ++w)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    hidden[t][w][i] = counts[t][i / 2] ? hidden[t][w][i] + fmaxf(sums[t][w][i], 0.f) : 0.f;
        if (layer == kFurther) break;
        __syncthreads();  // all have read their neighbours' rows
#pragma unroll
        for (int t = 0; t < kTall; ++t)
#pragma unroll
            for (int w = 0; w < kWide; ++w)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    __half *to = rows + (1 + warp * kRows + 16 * t + 8 * r + lane / 4) * kStride + 8 * w + lane % 4 * 2;
                    *reinterpret_cast<__half2 *>(to) = __floats2half2_rn(hidden[t][w][2 * r], hidden[t][w][2 * r + 1]);
                }
        __syncthreads();
        const int slices = kTaps * (kInputs + layer * kHidden) / 16;
        convolve<kHidden / 16>(sums, read, weight + slices * kSlice / 8, bias + (1 + layer) * kHidden);
    }

    const float *out = bias + (1 + kFurther) * kHidden;
#pragma unroll
    for (int t = 0; t < kTall; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float score = 0.f;
#pragma unroll
            for (int w = 0; w < kWide; ++w)
#pragma unroll
                for (int i = 0; i < 2; ++i) score = fmaf(hidden[t][w][2 * r + i], out[8 * w + lane % 4 * 2 + i], score);
            score += __shfl_xor_sync(kAll, score, 1);
            score += __shfl_xor_sync(kAll, score, 2);
            const int n = origin + 1 + warp * kRows + 16 * t + 8 * r + lane / 4;
            if (lane % 4 == 0 && n >= begin && n < end) scores[n] = counts[t][r] ? score + out[kHidden] : -INFINITY;
        }
}

}  // namespace
