// Common parts of the CPU kernels.
//
// Loops are written for the compiler to vectorise. Threads take whole rows (a KV head of a sequence), so results don't depend on
// the number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace cpu {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Half { _Float16 x; };
struct BFloat16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return static_cast<float>(x.x); }
inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void from_float(float x, float *to) { *to = x; }
inline void from_float(float x, Half *to) { to->x = static_cast<_Float16>(x); }
inline void from_float(float x, BFloat16 *to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

// Calls run with a value of the element type and returns 0; returns 1 for an unknown type.
template <typename Run>
int with_element(int64_t element, const Run &run) {
    if (element == kFloat32) run(float{});
    else if (element == kFloat16) run(Half{});
    else if (element == kBFloat16) run(BFloat16{});
    else return 1;
    return 0;
}

// Calls work(0) to work(count - 1), on several threads.
template <typename Work>
void parallel_for(int64_t count, int64_t workers, const Work &work) {
    workers = std::min(workers, count);
    std::atomic<int64_t> next{0};
    const auto loop = [&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < workers; ++i) others.emplace_back(loop);
    } catch (const std::system_error &) {
        // No more threads available: the existing ones do all the work.
    }
    loop();
    for (std::thread &one : others) one.join();
}

// exp for x <= 0, to 2 units in the last place, in a form that compilers vectorise, unlike std::exp.
inline float exp_below(float x) {
    const float held = std::max(x, -87.f);
    const float whole = std::nearbyint(held * 1.44269504f);
    const float rest = (held - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two pieces
    float y = 1.9875691500e-4f;  // Cephes' coefficients
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = y * rest + c;
    y = y * rest * rest + rest + 1.f;
    const int32_t exponent = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, 4);
    return x < -87.f ? 0.f : y * power;
}

// Replaces logits by weights relative to the largest one; zeros if all are -inf.
inline void to_weights(float *logit, int64_t count, float *peak, float *sum) {
    float top = kNever, total = 0.f;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, logit[i]);
    if (top == kNever) std::fill(logit, logit + count, 0.f);
    else for (int64_t i = 0; i < count; ++i) total += logit[i] = exp_below(logit[i] - top);
    *peak = top;
    *sum = top == kNever ? kNever : top + std::log(total);
}

constexpr int kHeads = 4;  // whose sums are in registers together

// Products of one key with kCount queries, which are D apart.
template <int kCount>
inline void dots(const float *__restrict query, const float *__restrict key, int64_t D, float *__restrict dot) {
    float sum[kCount] = {};
    for (int64_t d = 0; d < D; ++d)
        for (int m = 0; m < kCount; ++m) sum[m] += query[m * D + d] * key[d];
    for (int m = 0; m < kCount; ++m) dot[m] = sum[m];
}

// Products of one key with the queries of all heads of a group.
inline void all_dots(const float *query, const float *key, int64_t D, int64_t heads, float *dot) {
    int64_t m = 0;
    for (; m + kHeads <= heads; m += kHeads) dots<kHeads>(query + m * D, key, D, dot + m);
    for (; m < heads; ++m) dots<1>(query + m * D, key, D, dot + m);
}

}  // namespace cpu
