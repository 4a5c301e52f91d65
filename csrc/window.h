#pragma once
#include "candidates.cuh"

// An incremental step of the published network: the window of R = 64 rows, and sums of features over all rows but the ends.
struct WindowStep {
    const float *row;       // [B, G, columns] the step's scores
    void *window;           // [B, G, capacity, R] fp16, oldest first
    double *sum;            // [B, G, 32, capacity]
    const void *weight;     // fp16, of the second convolution, as `pack_network` lays it out
    const float *rest;      // [16 · 9 + 16] of the first convolution; [32] biases of the second; [32 + 1] of the third
    float *scores;          // [B, G, columns]
    Candidates candidates;  // blocks to score
    int64_t batch, kv_heads, columns, capacity;
};
