// What the Python side passes to the kernels: one struct an operation, the same for a GPU and a CPU, each in its own header;
// the operation's Python module has the same struct, field by field.
// Shapes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence, N blocks,
// D head size.
#pragma once
#include <cstdint>

enum ElementType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
