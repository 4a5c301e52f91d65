// Sparse decode attention on a CPU.

#include "attention.h"
#include "cpu.h"

namespace {

using namespace cpu;

inline void add(float weight, const float *__restrict value, int64_t D, float *__restrict out) {
    for (int64_t d = 0; d < D; ++d) out[d] += weight * value[d];
}

template <typename E>
void attend_row(const SparseDecode &a, int64_t row) {
    const int64_t b = row / a.kv_heads, kv_head = row % a.kv_heads, group = a.group;
    const int64_t D = a.head_dim, T = a.tokens, S = a.slots, first = row * group;
    const int64_t length = a.length_B ? a.length_B[b] : a.length, padding = a.padding ? a.padding[b] : 0;
    int64_t visible = padding;
    if (a.window) visible = std::max(visible, length - a.window);
    if (a.chunk) visible = std::max(visible, padding + (length - 1 - padding) / a.chunk * a.chunk);
    const float scaling = static_cast<float>(a.scaling), softcap = static_cast<float>(a.softcap);
    // Weights of a slot are relative to the slot's own peak; they are rescaled when the overall peak is known.
    std::vector<float> query(group * D), weight(group * S * T), part(D), out(group * D, 0.f), dot(group);
    std::vector<float> top(group, kNever), total(group, 0.f);
    for (int64_t i = 0; i < group * D; ++i) query[i] = scaling * to_float(static_cast<const E *>(a.query)[first * D + i]);
    for (int64_t s = 0; s < S; ++s) {
        const int64_t block = a.block[row * S + s];
        for (int64_t t = 0; t < T; ++t) {
            const int64_t token = block * T + t;
            const bool seen =
                block >= 0 && token >= visible && token < length && (a.real == nullptr || a.real[b * a.length + token]);
            if (!seen) {
                for (int64_t m = 0; m < group; ++m) weight[(m * S + s) * T + t] = kNever;
                continue;
            }
            const E *key = static_cast<const E *>(a.key) + ((row * S + s) * T + t) * D;
            for (int64_t d = 0; d < D; ++d) part[d] = to_float(key[d]);
            all_dots(query.data(), part.data(), D, group, dot.data());
            for (int64_t m = 0; m < group; ++m)
                weight[(m * S + s) * T + t] = softcap != 0.f ? softcap * std::tanh(dot[m] / softcap) : dot[m];
        }
        for (int64_t m = 0; m < group; ++m) {
            const int64_t at = (first + m) * S + s;
            to_weights(&weight[(m * S + s) * T], T, &a.peak[at], &a.sum[at]);
            top[m] = std::max(top[m], a.peak[at]);
        }
    }
    if (a.value == nullptr) return;
    for (int64_t m = 0; m < group; ++m) {
        const float sink = a.sinks ? a.sinks[kv_head * group + m] : kNever;
        top[m] = std::max(top[m], sink);
        total[m] = a.sinks ? std::exp(sink - top[m]) : 0.f;
    }
    for (int64_t s = 0; s < S; ++s) {
        if (a.block[row * S + s] < 0) continue;
        for (int64_t m = 0; m < group; ++m) {
            const float worth = std::exp(a.peak[(first + m) * S + s] - top[m]);
            for (int64_t t = 0; t < T; ++t) total[m] += weight[(m * S + s) * T + t] *= worth;
        }
        for (int64_t t = 0; t < T; ++t) {
            const E *value = static_cast<const E *>(a.value) + ((row * S + s) * T + t) * D;
            for (int64_t d = 0; d < D; ++d) part[d] = to_float(value[d]);
            for (int64_t m = 0; m < group; ++m) {
                const float w = weight[(m * S + s) * T + t];
                if (w == 0.f) continue;  // skips unwritten values, which may be NaN
                add(w, part.data(), D, &out[m * D]);
            }
        }
    }
    for (int64_t m = 0; m < group; ++m) {
        for (int64_t d = 0; d < D; ++d)
            from_float(out[m * D + d] / total[m], static_cast<E *>(a.out) + (first + m) * D + d);
        a.lse[first + m] = top[m] + std::log(total[m]);
    }
}

}  // namespace

// `splits` is the number of threads here.
extern "C" int sparse_decode(const SparseDecode *a) {
    return with_element(a->element, [&](auto number) {
        parallel_for(a->batch * a->kv_heads, a->splits, [&](int64_t row) { attend_row<decltype(number)>(*a, row); });
    });
}
