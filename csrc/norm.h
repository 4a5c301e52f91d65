#pragma once
#include "kernels.h"

// When a normalised fp32 element x̂ is rounded to the elements' type, and its factor.
enum NormForm : int64_t { kCastFirst = 0, kOnePlus = 1, kCastLast = 2 };  // w · cast(x̂), cast((1 + w) · x̂), cast(w · x̂)

// Root-mean-square normalisation of rows.
struct RmsNorm {
    const void *x;       // [rows, width]
    const void *weight;  // [width]
    void *out;           // [rows, width]
    int64_t width, form;
    int64_t wide;        // 1: rows and addresses are multiples of 16 bytes
    double eps;
};
