// The scores of a sketch on a CPU.

#include "cpu.h"
#include "sketch.h"

namespace {

using namespace cpu;

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

extern "C" int sketch_scores(const SketchScores *a) {
    return with_element(a->sketch.element, [&](auto number) {
        parallel_for(a->sketch.batch * a->sketch.kv_heads, a->workers,
              [&](int64_t row) { score_row<decltype(number)>(*a, row); });
    });
}
