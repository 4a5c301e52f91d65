// Sparse decode attention: one new token over the slots of a block pool; the query heads of a KV head go together.
//
// A warp takes a slot at a time. Eight elements of the head make a lane's part of a token, so that every load is 16 bytes
// (32 in fp32) and one warp reads 32 / lanes tokens at once. Logits of the slot's tokens go through shared memory, where
// their maximum and sum are found: they are what the history is told of the block, and what the softmax is made with.
// Warps, then splits over the slots, are merged by log-sum-exp (as in FlashDecoding).

#include "attention.h"
#include "device.cuh"

namespace {

using namespace device;

constexpr int kWarps = 4;
constexpr int kPart = 8;        // elements of a token in one lane
constexpr int kMaxTokens = 64;  // of a block

template <typename E>
__device__ __forceinline__ void load_part(const E *from, float (&part)[kPart]) {
    constexpr int kVectors = kPart * sizeof(E) / 16;
    uint4 raw[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) raw[v] = reinterpret_cast<const uint4 *>(from)[v];
    const E *elements = reinterpret_cast<const E *>(raw);
#pragma unroll
    for (int i = 0; i < kPart; ++i) part[i] = to_float(elements[i]);
}

// kLanes: lanes of a token, some of which may idle; M: query heads handled together.
template <typename E, int kLanes, int M>
__global__ void __launch_bounds__(32 * kWarps) attend_slots(const SparseDecode a) {
    constexpr int kTogether = 32 / kLanes;  // tokens read at once
    __shared__ float weight[kWarps][M][kMaxTokens];
    __shared__ float merged[kWarps][M][kLanes * kPart];
    __shared__ float merged_max[kWarps][M], merged_sum[kWarps][M];

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int part = lane % kLanes, sub = lane / kLanes;
    const int D = static_cast<int>(a.head_dim);
    const bool has_part = part * kPart < D;
    const int group = static_cast<int>(a.heads / a.kv_heads);
    const int pieces = (group + M - 1) / M;  // a group of many heads takes several blocks of threads
    const int kv_head = blockIdx.y / pieces, first = (blockIdx.y % pieces) * M;
    const int heads = min(M, group - first);
    const int64_t row = blockIdx.z * a.kv_heads + kv_head;
    const int64_t head0 = blockIdx.z * a.heads + static_cast<int64_t>(kv_head) * group + first;  // over all sequences
    const int tokens = static_cast<int>(a.tokens);
    const float scaling = static_cast<float>(a.scaling), softcap = static_cast<float>(a.softcap);
    const bool attends = a.value != nullptr;

    float query[M][kPart], acc[M][kPart], top[M], total[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        top[m] = -INFINITY;
        total[m] = 0.f;
#pragma unroll
        for (int i = 0; i < kPart; ++i) query[m][i] = acc[m][i] = 0.f;
        if (has_part && m < heads)
            load_part(static_cast<const E *>(a.query) + (head0 + m) * D + part * kPart, query[m]);
    }

    for (int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + warp; slot < a.slots;
         slot += static_cast<int64_t>(gridDim.x) * kWarps) {
        const int64_t block = a.block[row * a.slots + slot];
        if (block < 0) {
            if (lane < heads) {
                a.peak[(head0 + lane) * a.slots + slot] = -INFINITY;
                a.sum[(head0 + lane) * a.slots + slot] = -INFINITY;
            }
            continue;
        }
        const int64_t offset = (row * a.slots + slot) * tokens * D;
        const E *key = static_cast<const E *>(a.key) + offset;
        for (int t0 = 0; t0 < tokens; t0 += kTogether) {
            const int t = t0 + sub;
            float loaded[kPart] = {};
            if (has_part && t < tokens) load_part(key + t * D + part * kPart, loaded);
            const int64_t token = block * tokens + t;
            const bool seen = t < tokens && token < a.length &&
                              (a.real == nullptr || a.real[blockIdx.z * a.length + token]);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                float dot = 0.f;
#pragma unroll
                for (int i = 0; i < kPart; ++i) dot = fmaf(query[m][i], loaded[i], dot);
#pragma unroll
                for (int o = kLanes / 2; o; o /= 2) dot += __shfl_xor_sync(kAll, dot, o);
                dot *= scaling;
                if (softcap != 0.f) dot = softcap * tanhf(dot / softcap);
                if (part == 0 && t < tokens) weight[warp][m][t] = seen ? dot : -INFINITY;
            }
        }
        __syncwarp();
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float peak = -INFINITY;
            for (int t = lane; t < tokens; t += 32) peak = fmaxf(peak, weight[warp][m][t]);
            peak = warp_max(peak);
            float sum = 0.f;
            if (peak > -INFINITY)
                for (int t = lane; t < tokens; t += 32) sum += expf(weight[warp][m][t] - peak);
            sum = warp_sum(sum);
            if (lane == 0 && m < heads) {
                a.peak[(head0 + m) * a.slots + slot] = peak;
                a.sum[(head0 + m) * a.slots + slot] = peak > -INFINITY ? peak + logf(sum) : -INFINITY;
            }
            const float now = fmaxf(top[m], peak);
            if (attends && now > -INFINITY) {
                const float shrink = expf(top[m] - now);  // 0 at the first slot
                total[m] = total[m] * shrink + sum * expf(peak - now);
                top[m] = now;
#pragma unroll
                for (int i = 0; i < kPart; ++i) acc[m][i] *= shrink;
                for (int t = lane; t < tokens; t += 32) weight[warp][m][t] = expf(weight[warp][m][t] - now);
            }
        }
        __syncwarp();
        if (attends) {
            const E *value = static_cast<const E *>(a.value) + offset;
            for (int t0 = 0; t0 < tokens; t0 += kTogether) {
                const int t = t0 + sub;
                float loaded[kPart] = {};
                if (has_part && t < tokens) load_part(value + t * D + part * kPart, loaded);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    // Without any token seen so far there are logits here still, and nothing to add.
                    const float w = t < tokens && top[m] > -INFINITY ? weight[warp][m][t] : 0.f;
#pragma unroll
                    for (int i = 0; i < kPart; ++i) acc[m][i] = fmaf(w, loaded[i], acc[m][i]);
                }
            }
            __syncwarp();
        }
    }
    if (!attends) return;

#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
#pragma unroll
            for (int o = kLanes; o < 32; o *= 2) acc[m][i] += __shfl_xor_sync(kAll, acc[m][i], o);
            if (sub == 0 && has_part) merged[warp][m][part * kPart + i] = acc[m][i];
        }
        if (lane == 0) {
            merged_max[warp][m] = top[m];
            merged_sum[warp][m] = total[m];
        }
    }
    __syncthreads();
    for (int m = 0; m < heads; ++m) {
        float now = -INFINITY;
        for (int w = 0; w < kWarps; ++w) now = fmaxf(now, merged_max[w][m]);
        float *partial = a.partial + ((head0 + m) * a.splits + blockIdx.x) * (D + 2);
        float sum = 0.f, share[kWarps];
        for (int w = 0; w < kWarps; ++w) {
            share[w] = now > -INFINITY ? expf(merged_max[w][m] - now) : 0.f;
            sum += share[w] * merged_sum[w][m];
        }
        for (int d = threadIdx.x; d < D; d += blockDim.x) {
            float x = 0.f;
            for (int w = 0; w < kWarps; ++w) x += share[w] * merged[w][m][d];
            partial[d] = x;
        }
        if (threadIdx.x == 0) {
            partial[D] = now;
            partial[D + 1] = sum;
        }
    }
}

// Splits to one output a head.
template <typename E>
__global__ void merge_splits(const SparseDecode a) {
    const int64_t head = blockIdx.x;  // over all sequences
    const int64_t width = a.head_dim + 2;
    const float *partial = a.partial + head * a.splits * width;
    float now = a.sinks ? a.sinks[head % a.heads] : -INFINITY;
    for (int64_t s = 0; s < a.splits; ++s) now = fmaxf(now, partial[s * width + a.head_dim]);
    float sum = a.sinks ? expf(a.sinks[head % a.heads] - now) : 0.f;
    for (int64_t s = 0; s < a.splits; ++s)
        sum += expf(partial[s * width + a.head_dim] - now) * partial[s * width + a.head_dim + 1];
    for (int64_t d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
        float x = 0.f;
        for (int64_t s = 0; s < a.splits; ++s)
            x += expf(partial[s * width + a.head_dim] - now) * partial[s * width + d];
        from_float(x / sum, static_cast<E *>(a.out) + head * a.head_dim + d);
    }
    if (threadIdx.x == 0) a.lse[head] = now + logf(sum);
}

template <typename E, int kLanes, int M>
void launch(const SparseDecode &a, cudaStream_t stream) {
    const int group = static_cast<int>(a.heads / a.kv_heads), pieces = (group + M - 1) / M;
    const dim3 grid(static_cast<unsigned>(a.splits), static_cast<unsigned>(a.kv_heads * pieces),
                    static_cast<unsigned>(a.batch));
    device::launch(attend_slots<E, kLanes, M>, grid, dim3(32 * kWarps), 0, stream, a);
    if (a.value != nullptr)
        device::launch(merge_splits<E>, dim3(static_cast<unsigned>(a.batch * a.heads)), dim3(128), 0, stream, a);
}

template <typename E, int kLanes>
void choose_heads(const SparseDecode &a, cudaStream_t stream) {
    if (a.heads == a.kv_heads) launch<E, kLanes, 1>(a, stream);
    else launch<E, kLanes, 4>(a, stream);
}

template <typename E>
void choose_lanes(const SparseDecode &a, cudaStream_t stream) {
    if (a.head_dim <= 8 * kPart) choose_heads<E, 8>(a, stream);
    else if (a.head_dim <= 16 * kPart) choose_heads<E, 16>(a, stream);
    else choose_heads<E, 32>(a, stream);
}

}  // namespace

extern "C" int sparse_decode(const SparseDecode *a, void *stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (a->tokens > kMaxTokens || a->head_dim % kPart || a->head_dim > 32 * kPart) return cudaErrorInvalidValue;
    if (a->element == kFloat32) choose_lanes<float>(*a, cuda_stream);
    else if (a->element == kFloat16) choose_lanes<__half>(*a, cuda_stream);
    else if (a->element == kBFloat16) choose_lanes<__nv_bfloat16>(*a, cuda_stream);
    else return cudaErrorInvalidValue;
    return static_cast<int>(cudaGetLastError());
}

extern "C" const char *error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
