#pragma once
#include "kernels.h"

// The next step's scores by the time filters' network: C = 14 channels a block in, 32 hidden ones.
struct PredictBlocks {
    const float *state;       // [B, G, capacity, C]
    const void *weight;       // fp16, as `FilterPredictor.packed` lays it out
    const float *bias;        // [4 · 32] of the convolutions, [32] the weights of the last one, [1] its bias
    const int64_t *length_B;  // tokens of each sequence; null: length
    const int64_t *padding;   // [B] tokens of left padding, behind which `first` counts; null: none
    float *scores;            // [B, G, columns]
    int64_t batch, kv_heads, capacity, columns, first, recent, block_size, length;
};
