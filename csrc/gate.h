#pragma once
#include "kernels.h"

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// act(gate) · up, elementwise.
struct Gate {
    const void *gate, *up;  // [rows, width], a row's elements contiguous
    void *out;              // [rows, width]
    int64_t rows, width;
    int64_t gate_stride, up_stride;  // strides in elements
    int64_t activation;
    int64_t wide;           // 1: rows and addresses are multiples of 16 bytes
};
