#pragma once
#include "candidates.cuh"

// The next step's scores by the time filters' network: C = 14 input channels per block, 32 hidden ones.
struct PredictBlocks {
    const float *state;  // [B, G, capacity, C]
    const void *weight;  // fp16, in the layout of `FilterPredictor.packed`
    const float *bias;   // [4 · 32] of the convolutions, [32] the weights of the last one, [1] its bias
    float *scores;       // [B, G, columns]
    Candidates candidates;
    int64_t batch, kv_heads, capacity, columns;
};
