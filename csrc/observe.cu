// Computes one or several score rows and updates the state with them, in one pass over the state.
//
// A thread block takes a tile of blocks of one KV head. Its state is contiguous; a thread reads and writes vectors of 16 bytes,
// which may begin in any channel. Seven vectors are two blocks. With a multiple of seven threads, a thread has the same channels
// in all of its vectors, and the same operations. All loads from global memory are issued before the first is used.

#include "device.cuh"
#include "observe.h"

namespace {

constexpr int kChannels = 14;
constexpr int kFilters = 8;   // the averages come first
constexpr int kPeriod = 7;    // vectors in two blocks
constexpr int kTile = 128;    // blocks
constexpr int kThreads = 32 * kPeriod;
constexpr int kVectors = kTile / 2 * kPeriod / kThreads;  // of a thread
static_assert(kVectors * kThreads == kTile / 2 * kPeriod && kThreads >= kTile, "a thread has whole vectors and a block at most");

// The logarithm of the largest probability of a block over the query heads, from each head's logit.
template <typename Logit, typename Total>
__device__ __forceinline__ float largest_share(Logit logit, Total total, int group) {
    float most = -INFINITY;
#pragma unroll 4
    for (int m = 0; m < group; ++m) most = fmaxf(most, logit(m) - total(m));  // fmaxf ignores the NaN of −inf − −inf
    return most;
}

__device__ __forceinline__ void fold_row(const ObserveRow &a) {
    __shared__ int slot_of[kTile];     // −1: not attended
    __shared__ float log_score[kTile];
    const float eps = static_cast<float>(a.eps), full_scale = static_cast<float>(a.full_scale);
    const int64_t length = a.length_B ? min(a.length_B[blockIdx.z], a.length) : a.length;  // the load is still pending
    const int first = blockIdx.x * kTile;
    const int t = threadIdx.x;
    const int64_t row = blockIdx.z * a.kv_heads + blockIdx.y;

    auto *state = reinterpret_cast<float4 *>(a.state + (row * a.capacity + first) * kChannels);
    const int room = min(kTile, static_cast<int>(a.capacity) - first) * kChannels / 4;  // vectors; the capacity is even
    float4 vector[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        vector[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (t + i * kThreads < room && !a.fresh) vector[i] = state[t + i * kThreads];
    }

    // Averages move towards the score by a weight; peaks (and the last score) fall by a step, but not below the score.
    bool averages[4];
    float fold[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int channel = (4 * t + j) % kChannels;
        averages[j] = channel < kFilters;
        fold[j] = a.fold[channel];
    }

    const int group = static_cast<int>(a.heads / a.kv_heads);
    const auto total = [&](int m) {
        const float x = a.total[row * group + m], y = a.rest ? a.rest[row * group + m] : -INFINITY, more = fmaxf(x, y);
        return y == -INFINITY ? x : more + log1pf(expf(fminf(x, y) - more));
    };
    const int rows = static_cast<int>(a.rows);
    const float *given = a.given + row * rows * a.columns + first + t;
    const int64_t *block = a.block + row * a.slots;
    const int64_t near = a.given == nullptr && t < a.slots ? block[t] : -1;
    float share = -INFINITY;  // stays without effect for blocks that do not exist yet
    if (a.given == nullptr && a.peak != nullptr && t < kTile && first + t < a.columns) {
        const float *peak = a.peak + row * group * a.columns + first + t;
        share = largest_share([&](int m) { return peak[m * a.columns]; }, total, group);
    }
    const int block_size = static_cast<int>(a.block_size);
    const int known = min(kTile, (static_cast<int>(length) + block_size - 1) / block_size - first);
    if (known <= 0) return;
    const int held = (known * kChannels + 3) / 4;  // vectors of known blocks; the last may reach into an unknown one
    float score = 0.f;
    if (a.given != nullptr) {
        if (t < known) score = *given;
    } else {
        if (t < kTile) slot_of[t] = -1;
        __syncthreads();
        for (int64_t s = t; s < a.slots; s += kThreads) {
            const int64_t place = (s == t ? near : block[s]) - first;
            if (place >= 0 && place < known) slot_of[place] = static_cast<int>(s);
        }
        __syncthreads();
        if (t < known) {
            if (slot_of[t] >= 0) {
                const float *peak = a.slot_peak + row * group * a.slots + slot_of[t];
                share = largest_share([&](int m) { return peak[m * a.slots]; }, total, group);
            }
            score = expf(share);
        }
    }
    for (int r = 0;; ++r) {
        if (t < known) {
            if (a.row != nullptr) a.row[row * a.columns + first + t] = score;
            log_score[t] = log1pf(score / eps) / full_scale;
            if (r + 1 < rows) score = given[(r + 1) * a.columns];
        }
        __syncthreads();
        const bool begins = a.fresh && r == 0;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (t + i * kThreads >= held) break;
            float x[4] = {vector[i].x, vector[i].y, vector[i].z, vector[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int place = (4 * t + j) / kChannels + i * (kThreads / kPeriod * 2);
                if (place >= known) continue;  // unknown blocks stay zero
                const float y = log_score[place];
                x[j] = begins ? y : averages[j] ? fmaf(fold[j], y - x[j], x[j]) : fmaxf(x[j] - fold[j], y);
            }
            vector[i] = make_float4(x[0], x[1], x[2], x[3]);
        }
        if (r + 1 >= rows) break;
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
        if (t + i * kThreads < held) state[t + i * kThreads] = vector[i];
}

}  // namespace
