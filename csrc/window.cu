// The published network, evaluated incrementally (predictor/incremental.py says which rows of features a step needs), without
// feature maps in memory.
//
// Every thread block computes two 3 × 3 convolutions of a band of five lines, over one position per thread. Lines are rows of
// the window and positions its columns. At the ends of the predicted range, whose columns are computed over the whole window,
// lines are columns, positions are rows, and the filters are transposed. The first convolution is in fp32, one thread per
// position, three lines of maps at once. The second uses the tensor cores: the 16 maps of one tap are one slice of the sum, and
// a tap is the maps of another line or position. Sums subtract exactly what they added: the same instructions on the same
// numbers.

#include "device.cuh"
#include "window.h"

namespace {

using namespace device;

constexpr int kRows = 64;
constexpr int kMaps = 16, kFeatures = 32, kTaps = 9;
constexpr int kLines = 5, kPlanes = kLines - 2;  // of a band, and of its maps
constexpr int kWarps = 4, kPositions = 32 * kWarps;
constexpr int kOutputs = kPositions - 2;  // features of the first and last position would need another neighbour
constexpr int kTall = 2, kWide = kFeatures / 8;
constexpr int kStride = kMaps + 8;  // elements per position, so that eight positions are in different banks
constexpr int kBias1 = kMaps * kTaps, kBias2 = kBias1 + kMaps, kThird = kBias2 + kFeatures, kRest = kThird + kFeatures + 1;
constexpr int kReach = 2;  // columns to each side that a score depends on

using Sums = float[kTall][kWide][4];

struct SharedMemory {
    uint4 weight[kTaps * kMaps * kFeatures / 8];
    uint4 maps[kPlanes][kPositions + 2][kStride / 8];
    __half line[2][kLines][kPositions + 2];  // two bands, with one extra position at each end
    float rest[kRest];
    float total[kWarps][2][kFeatures];
};

// Loads the network; filters are transposed if lines are columns.
__device__ __forceinline__ void load_network(SharedMemory &s, const WindowStep &a, bool turned) {
    for (int i = threadIdx.x; i < kTaps * kMaps * kFeatures / 8; i += kPositions)
        copy_async(s.weight + i, static_cast<const uint4 *>(a.weight) + i);
    commit_copies();
    for (int i = threadIdx.x; i < kRest; i += kPositions) {
        const int tap = i % kTaps, other = tap % 3 * 3 + tap / 3;
        s.rest[i] = a.rest[turned && i < kBias1 ? i - tap + other : i];
    }
    for (int i = threadIdx.x; i < kPlanes * 2 * kStride / 8; i += kPositions)
        s.maps[i / 2 / (kStride / 8)][i % 2 * (kPositions + 1)][i / 2 % (kStride / 8)] = make_uint4(0, 0, 0, 0);
    wait_copies<0>();
}

// Computes the maps of the band's three inner lines at this thread's position; zero if the position does not count.
__device__ __forceinline__ void make_maps(SharedMemory &s, int band, bool counts) {
    const int p = threadIdx.x;
    float x[kLines][3];
#pragma unroll
    for (int l = 0; l < kLines; ++l)
#pragma unroll
        for (int j = 0; j < 3; ++j) x[l][j] = to_float(s.line[band][l][p + j]);
#pragma unroll 1
    for (int part = 0; part < kMaps / 8; ++part) {
        __half2 y[kPlanes][4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            float of_two[kPlanes][2];
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const int map = 8 * part + 2 * pair + which;
#pragma unroll
                for (int m = 0; m < kPlanes; ++m) of_two[m][which] = s.rest[kBias1 + map];
#pragma unroll
                for (int tap = 0; tap < kTaps; ++tap) {
                    const float w = s.rest[map * kTaps + tap];
#pragma unroll
                    for (int m = 0; m < kPlanes; ++m)
                        of_two[m][which] = fmaf(w, x[m + tap / 3][tap % 3], of_two[m][which]);
                }
            }
#pragma unroll
            for (int m = 0; m < kPlanes; ++m)
                y[m][pair] = counts ? __floats2half2_rn(fmaxf(of_two[m][0], 0.f), fmaxf(of_two[m][1], 0.f))
                                    : __floats2half2_rn(0.f, 0.f);
        }
#pragma unroll
        for (int m = 0; m < kPlanes; ++m) memcpy(&s.maps[m][p + 1][part], y[m], sizeof(uint4));
    }
}

// Computes features of the warp's positions on the middle line; kShift: on the line before it (1) or after it (−1), at the end of
// the band.
template <int kShift>
__device__ __forceinline__ void make_features(Sums &sums, const SharedMemory &s, bool turned) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int w = 0; w < kWide; ++w)
#pragma unroll
        for (int t = 0; t < kTall; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][w][i] = s.rest[kBias2 + 8 * w + lane % 4 * 2 + i % 2];
#pragma unroll
    for (int l = 0; l < 3; ++l) {
        const int plane = l - kShift;
        if (plane < 0 || plane >= kPlanes) continue;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            const uint4 *weight = s.weight + (turned ? 3 * j + l : 3 * l + j) * kMaps * kFeatures / 8 + lane;
            uint32_t b[kWide][2];
#pragma unroll
            for (int w = 0; w < kWide; w += 2) {
                const uint4 two = weight[w / 2 * 32];
                b[w][0] = two.x, b[w][1] = two.y, b[w + 1][0] = two.z, b[w + 1][1] = two.w;
            }
#pragma unroll
            for (int t = 0; t < kTall; ++t) {
                uint32_t maps[4];
                load_matrices(maps, &s.maps[plane][32 * warp + 16 * t + lane % 16 + j][lane / 16]);
#pragma unroll
                for (int w = 0; w < kWide; ++w) multiply(sums[t][w], maps, b[w]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kTall; ++t)
#pragma unroll
        for (int w = 0; w < kWide; ++w)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][w][i] = fmaxf(sums[t][w][i], 0.f);
}

__device__ __forceinline__ void add(Sums &to, const Sums &x) {
#pragma unroll
    for (int t = 0; t < kTall; ++t)
#pragma unroll
        for (int w = 0; w < kWide; ++w)
#pragma unroll
            for (int i = 0; i < 4; ++i) to[t][w][i] += x[t][w][i];
}

// Position of sums[t][.][i] of this thread.
__device__ __forceinline__ int position(int t, int i) {
    return threadIdx.x / 32 * 32 + 16 * t + i / 2 * 8 + threadIdx.x % 32 / 4;
}
// Feature of sums[.][w][i].
__device__ __forceinline__ int feature(int w, int i) { return 8 * w + threadIdx.x % 4 * 2 + i % 2; }

// Reads eight rows of a column of the window, from row `from` on; zeros if there is no such column.
__device__ __forceinline__ void read_column(const WindowStep &a, int64_t row, int column, int from, __half (&to)[8]) {
    uint4 raw = make_uint4(0, 0, 0, 0);
    const auto *window = static_cast<const __half *>(a.window) + row * a.capacity * kRows;
    if (column >= 0 && column < a.capacity) raw = *reinterpret_cast<const uint4 *>(window + column * kRows + from);
    memcpy(to, &raw, sizeof raw);
}

// Loads the window's first rows to one band, from line kLow on, and its last rows to the other, up to line kHigh.
template <int kLow, int kHigh>
__device__ __forceinline__ void load_lines(SharedMemory &s, const WindowStep &a, int64_t row, int base) {
    for (int p = static_cast<int>(threadIdx.x) - 1; p <= kPositions; p += kPositions) {
        __half first[8], last[8];
        read_column(a, row, base + p, 0, first);
        read_column(a, row, base + p, kRows - 8, last);
#pragma unroll
        for (int l = 0; l < kLines; ++l) {
            if (l >= kLow) s.line[0][l][p + 1] = first[l - kLow];
            if (l < kHigh) s.line[1][l][p + 1] = last[8 - kHigh + l];
        }
    }
}

// Subtracts the features of the row that leaves the interior from the sums, and adds those of the row that enters it.
__device__ __forceinline__ void slide_sums(const WindowStep &a) {
    __shared__ SharedMemory s;
    const int64_t row = blockIdx.z * a.kv_heads + blockIdx.y;
    const int base = static_cast<int>(blockIdx.x) * kOutputs - 1;  // column of position 0
    load_lines<0, kLines - 1>(s, a, row, base);
    for (int p = static_cast<int>(threadIdx.x) - 1; p <= kPositions; p += kPositions) {
        const int column = base + p;
        const bool exists = column >= 0 && column < a.columns;
        s.line[1][kLines - 1][p + 1] = __float2half_rn(exists ? a.row[row * a.columns + column] : 0.f);
    }
    load_network(s, a, false);
    Sums change[2];
#pragma unroll
    for (int band = 0; band < 2; ++band) {
        __syncthreads();
        make_maps(s, band, true);
        __syncthreads();
        make_features<0>(change[band], s, false);
    }
#pragma unroll
    for (int t = 0; t < kTall; ++t)
#pragma unroll
        for (int w = 0; w < kWide; ++w)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int p = position(t, i), column = base + p;
                if (p < 1 || p > kOutputs || column >= a.columns) continue;
                double &sum = a.sum[(row * kFeatures + feature(w, i)) * a.capacity + column];
                sum += static_cast<double>(change[1][t][w][i]) - static_cast<double>(change[0][t][w][i]);
            }
}

// Shifts the window by one row and appends the step's row; 8 threads per column.
__device__ __forceinline__ void slide_window(const WindowStep &a) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) / 8, part = threadIdx.x % 8;
    const int64_t row = blockIdx.z * a.kv_heads + blockIdx.y;
    const bool counts = column < a.columns;
    auto *at = static_cast<__half *>(a.window) + (row * a.capacity + column) * kRows + 8 * part;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (counts) x = *reinterpret_cast<const uint4 *>(at);
    uint32_t next = __shfl_down_sync(kAll, x.x, 1);
    if (counts && part == 7) {
        const __half score = __float2half_rn(a.row[row * a.columns + column]);
        uint16_t bits;
        memcpy(&bits, &score, 2);
        next = bits;
    }
    if (!counts) return;
    *reinterpret_cast<uint4 *>(at) = make_uint4(x.x >> 16 | x.y << 16, x.y >> 16 | x.z << 16, x.z >> 16 | x.w << 16,
                                                x.w >> 16 | next << 16);
}

// Computes scores from the sums and the two rows of features at each end of the window. Two more thread blocks compute the two
// columns at each end of the range, where the network pads features, over the whole window.
__device__ __forceinline__ void score_columns(const WindowStep &a) {
    __shared__ SharedMemory s;
    const int64_t row = blockIdx.z * a.kv_heads + blockIdx.y;
    const Range range = range_of(a.candidates, blockIdx.z, static_cast<int>(a.columns));
    // The shuffle makes the compiler keep the result, not its inputs: saves 10 registers, and fits a fourth thread block.
    const int first = __shfl_sync(kAll, range.first, 0), last = __shfl_sync(kAll, range.last, 0);
    const int end = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - 2);  // 0, 1: an end of the range
    const bool turned = end >= 0;
    const float *third = s.rest + kThird;
    float *scores = a.scores + row * a.columns;
    Sums sums;
    if (turned) {
        const int among = last - first;  // columns, which may be fewer than the two at each end
        if (among <= 0) return;
        // Lines are four columns, zeros outside of the range; at the first end they come after a line of zeros.
        for (int l = 0; l < kLines; ++l)
            for (int p = threadIdx.x; p < kPositions + 2; p += kPositions) s.line[0][l][p] = __float2half_rn(0.f);
        load_network(s, a, true);
        __syncthreads();
        const int line = threadIdx.x / 8, from = threadIdx.x % 8 * 8;  // of the first 32 threads
        const int column = end ? last - (kLines - 1) + line : first + line;
        if (line < kLines - 1 && column >= first && column < last) {
            __half x[8];
            read_column(a, row, column, from, x);
#pragma unroll
            for (int i = 0; i < 8; ++i) s.line[0][end ? line : line + 1][from + i + 1] = x[i];
        }
        __syncthreads();
        make_maps(s, 0, threadIdx.x < kRows);
        // With fewer columns than lines of maps, the network pads the maps.
#pragma unroll 1
        for (int m = among; m < kPlanes; ++m)
            for (uint4 &part : s.maps[end ? kPlanes - 1 - m : m][threadIdx.x + 1]) part = make_uint4(0, 0, 0, 0);
        __syncthreads();
#pragma unroll
        for (int which = 0; which < 2; ++which) {  // the middle line, then the one next to the end
            if (which == 0) make_features<0>(sums, s, true);
            else if (end) make_features<-1>(sums, s, true);
            else make_features<1>(sums, s, true);
#pragma unroll
            for (int w = 0; w < kWide; ++w)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float total = 0.f;
#pragma unroll
                    for (int t = 0; t < kTall; ++t)
#pragma unroll
                        for (int r = 0; r < 2; ++r) total += position(t, 2 * r) < kRows ? sums[t][w][2 * r + i] : 0.f;
#pragma unroll
                    for (int offset = 4; offset < 32; offset *= 2) total += __shfl_xor_sync(kAll, total, offset);
                    if (threadIdx.x % 32 < 4) s.total[threadIdx.x / 32][which][feature(w, i)] = total;
                }
        }
        __syncthreads();
        if (threadIdx.x < 64) {
            const int which = threadIdx.x / 32, lane = threadIdx.x % 32;
            float total = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) total += s.total[w][which][lane];
            const float score = warp_sum(total / kRows * third[lane]) + third[kFeatures];
            const int inwards = kReach - 1 - which;
            const int n = end ? last - 1 - inwards : first + inwards;
            if (lane == 0 && (end ? n >= first + kReach : n < last)) scores[n] = score;
        }
        return;
    }

    const int base = static_cast<int>(blockIdx.x) * kOutputs - 1;  // column of position 0
    const int from = max(base + 1, 0), to = min(base + 1 + kOutputs, static_cast<int>(a.columns));
    if (to <= first + kReach || from >= last - kReach) {
        for (int n = from + threadIdx.x; n < to; n += kPositions)
            if (n < first || n >= last) scores[n] = -INFINITY;
        return;
    }
    load_lines<1, kLines - 1>(s, a, row, base);
    for (int p = threadIdx.x; p < kPositions + 2; p += kPositions) {
        s.line[0][0][p] = __float2half_rn(0.f);
        s.line[1][kLines - 1][p] = __float2half_rn(0.f);
    }
    load_network(s, a, false);
    Sums features;
    const double *inner = a.sum + (row * kFeatures + feature(0, 0)) * a.capacity + base + position(0, 0);
#pragma unroll
    for (int t = 0; t < kTall; ++t)
#pragma unroll
        for (int w = 0; w < kWide; ++w)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = base + position(t, i);
                const bool scored = column >= first + kReach && column < last - kReach;
                const double *sum = inner + (8 * w + i % 2) * a.capacity + 16 * t + i / 2 * 8;
                sums[t][w][i] = scored ? static_cast<float>(*sum) : 0.f;
            }
#pragma unroll
    for (int band = 0; band < 2; ++band) {
        __syncthreads();
        make_maps(s, band, true);
        __syncthreads();
        make_features<0>(features, s, false);
        add(sums, features);
        __syncthreads();  // else the compiler keeps the inputs of both features in registers, and spills
        if (band) make_features<-1>(features, s, false);
        else make_features<1>(features, s, false);
        add(sums, features);
    }
#pragma unroll
    for (int t = 0; t < kTall; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int n = base + position(t, 2 * r);
            const bool scored = n >= first + kReach && n < last - kReach;
            float score = 0.f;
#pragma unroll
            for (int w = 0; w < kWide; ++w)
#pragma unroll
                for (int i = 0; i < 2; ++i) score = fmaf(sums[t][w][2 * r + i] / kRows, third[feature(w, i)], score);
            score += __shfl_xor_sync(kAll, score, 1);
            score += __shfl_xor_sync(kAll, score, 2);
            if (threadIdx.x % 4 || n < from || n >= to) continue;
            if (scored) scores[n] = score + third[kFeatures];
            else if (n < first || n >= last) scores[n] = -INFINITY;
        }
}

}  // namespace
