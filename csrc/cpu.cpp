// The CPU's counterparts: sparse decode attention, the scores of a sketch, and the gather of blocks.
//
// Loops are written for the compiler to vectorise; rows (sequence and KV head) are shared between threads. Every thread works
// through whole rows, so that results don't depend on how many there are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "attention.h"
#include "gather.h"
#include "sketch.h"

namespace {

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

// Calls work(0) to work(count - 1), on several threads.
template <typename Work>
void share(int64_t count, int64_t workers, const Work &work) {
    workers = std::min(workers, count);
    std::atomic<int64_t> next{0};
    const auto loop = [&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < workers; ++i) others.emplace_back(loop);
    } catch (const std::system_error &) {
        // No more threads are to be had: those there are do all.
    }
    loop();
    for (std::thread &one : others) one.join();
}

// exp for arguments up to 0, to 2 units in the last place, in a form that compilers vectorise; std::exp is not.
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

// Logits become weights relative to their largest; where there is none, zeros.
inline void to_weights(float *logit, int64_t count, float *peak, float *sum) {
    float top = kNever, total = 0.f;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, logit[i]);
    if (top == kNever) std::fill(logit, logit + count, 0.f);
    else for (int64_t i = 0; i < count; ++i) total += logit[i] = exp_below(logit[i] - top);
    *peak = top;
    *sum = top == kNever ? kNever : top + std::log(total);
}

// Calls run with a number of the type, and returns 0; 1 for an unknown type.
template <typename Run>
int with_element(int64_t element, const Run &run) {
    if (element == kFloat32) run(float{});
    else if (element == kFloat16) run(Half{});
    else if (element == kBFloat16) run(BFloat16{});
    else return 1;
    return 0;
}

constexpr int kHeads = 4;  // whose sums are kept in registers together

// Products of one key with some heads' queries, each D after the one before.
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
    // Weights of a slot are relative to the slot's own peak; what that is worth is known once all are seen.
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
                if (w == 0.f) continue;  // also what was never written may stand there
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

inline float half_to_float(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
}

// The codes of token t of a group as numbers; bytes hold the tokens J apart (`quantise.pack`).
inline void unpack(const uint8_t *codes, int64_t t, int64_t J, int64_t channels, int64_t bits, float *out) {
    const uint8_t *from = codes + t % J * channels;
    const int64_t shift = bits * (t / J);
    const uint8_t mask = static_cast<uint8_t>((1 << bits) - 1);
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<float>((from[c] >> shift) & mask);
}

template <typename E>
void score_row(const SketchScores &a, int64_t row) {
    const Sketch &s = a.sketch;
    const int64_t b = row / s.kv_heads, kv_head = row % s.kv_heads, heads = a.heads / s.kv_heads;
    const int64_t length = a.length_B ? a.length_B[b] : a.length;
    const int64_t D = s.head_dim, first = b * a.heads + kv_head * heads, groups = length / s.group;
    const int64_t narrow_channels = s.coded - s.wide_channels;
    const int64_t wide_bytes = s.group * s.wide_bits / 8, narrow_bytes = s.group * s.bits / 8;
    const float scaling = static_cast<float>(a.scaling), softcap = static_cast<float>(a.softcap);
    const int64_t *order = s.order + row * D;
    std::vector<float> query(heads * D), ranked(heads * D), scaled(heads * s.coded);
    std::vector<float> logit(heads * length), zero(D), offset(heads), key(D), dot(heads);
    for (int64_t m = 0; m < heads; ++m) {
        const E *given = static_cast<const E *>(a.query) + (first + m) * D;
        for (int64_t d = 0; d < D; ++d) query[m * D + d] = scaling * to_float(given[d]);
        for (int64_t c = 0; c < D; ++c) ranked[m * D + c] = query[m * D + order[c]];
    }
    for (int64_t k = 0; k < groups; ++k) {
        const int64_t at = row * s.capacity + k;
        for (int64_t d = 0; d < D; ++d) zero[d] = half_to_float(s.zero[at * D + d]);
        all_dots(ranked.data(), zero.data(), D, heads, offset.data());
        for (int64_t m = 0; m < heads; ++m)
            for (int64_t c = 0; c < s.coded; ++c)
                scaled[m * s.coded + c] = ranked[m * D + c] * half_to_float(s.scale[at * s.coded + c]);
        for (int64_t t = 0; t < s.group; ++t) {
            if (s.wide) unpack(s.wide + at * wide_bytes * s.wide_channels, t, wide_bytes, s.wide_channels, s.wide_bits, key.data());
            unpack(s.narrow + at * narrow_bytes * narrow_channels, t, narrow_bytes, narrow_channels, s.bits,
                   key.data() + s.wide_channels);
            all_dots(scaled.data(), key.data(), s.coded, heads, dot.data());
            for (int64_t m = 0; m < heads; ++m) logit[m * length + k * s.group + t] = offset[m] + dot[m];
        }
    }
    for (int64_t token = groups * s.group; token < length; ++token) {
        const E *exact = static_cast<const E *>(s.tail) + (row * s.group + token % s.group) * D;
        for (int64_t d = 0; d < D; ++d) key[d] = to_float(exact[d]);
        all_dots(query.data(), key.data(), D, heads, dot.data());
        for (int64_t m = 0; m < heads; ++m) logit[m * length + token] = dot[m];
    }
    const int64_t blocks = (length + a.block_size - 1) / a.block_size;
    const int64_t columns = (a.length + a.block_size - 1) / a.block_size;
    for (int64_t m = 0; m < heads; ++m) {
        float *of_head = &logit[m * length];
        if (softcap != 0.f)
            for (int64_t i = 0; i < length; ++i) of_head[i] = softcap * std::tanh(of_head[i] / softcap);
        if (a.real)
            for (int64_t i = 0; i < length; ++i) of_head[i] = a.real[b * a.length + i] ? of_head[i] : kNever;
        for (int64_t n = 0; n < blocks; ++n) {
            const int64_t begin = n * a.block_size, end = std::min(length, begin + a.block_size);
            const int64_t at = (first + m) * columns + n;
            to_weights(of_head + begin, end - begin, &a.peak[at], &a.sum[at]);
        }
    }
}

}  // namespace

// `splits` is the number of threads here.
extern "C" int sparse_decode(const SparseDecode *a, void *) {
    return with_element(a->element, [&](auto number) {
        share(a->batch * a->kv_heads, a->splits, [&](int64_t row) { attend_row<decltype(number)>(*a, row); });
    });
}

extern "C" int sketch_scores(const SketchScores *a, void *) {
    return with_element(a->sketch.element, [&](auto number) {
        share(a->sketch.batch * a->sketch.kv_heads, a->workers,
              [&](int64_t row) { score_row<decltype(number)>(*a, row); });
    });
}

extern "C" int gather_blocks(const Gather *a, void *) {
    constexpr int64_t kPiece = 64;  // blocks that a thread takes at once
    share((a->n + kPiece - 1) / kPiece, a->workers, [&](int64_t piece) {
        for (int64_t i = piece * kPiece; i < std::min(a->n, (piece + 1) * kPiece); ++i) {
            const int64_t place = a->row[i] * a->slab_blocks + a->block[i] % a->slab_blocks;
            const char *slab = reinterpret_cast<const char *>(a->slab[a->block[i] / a->slab_blocks]);
            std::memcpy(static_cast<char *>(a->out) + i * a->block_bytes, slab + place * a->block_bytes, a->block_bytes);
        }
    });
    return 0;
}

extern "C" const char *error_text(int) { return "unknown type of elements"; }
