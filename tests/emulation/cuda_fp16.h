// Half precision of the emulated GPU: numbers that convert as CUDA's do.
#pragma once
#include "cuda_runtime.h"

struct __half { _Float16 x; };
struct __half2 { __half x, y; };
inline float __half2float(__half x) { return static_cast<float>(x.x); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }

// Through double, so that each rounds once.
inline __half half_of_double(double x) { return {static_cast<_Float16>(x)}; }
inline double double_of_half(__half x) { return static_cast<double>(x.x); }
inline __half2 __hneg2(__half2 a) { return {half_of_double(-double_of_half(a.x)), half_of_double(-double_of_half(a.y))}; }
inline __half2 __hmul2(__half2 a, __half2 b) {
    return {half_of_double(double_of_half(a.x) * double_of_half(b.x)), half_of_double(double_of_half(a.y) * double_of_half(b.y))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {half_of_double(double_of_half(a.x) * double_of_half(b.x) + double_of_half(c.x)),
            half_of_double(double_of_half(a.y) * double_of_half(b.y) + double_of_half(c.y))};
}
