// Rotary embedding of queries and keys in one launch: x · cos + rotate_half(x) · sin, each operation rounded as in torch.
//
// A thread takes 16 bytes of a head's first half with the matching 16 bytes of the second; or copies 16 bytes that are not rotated.

#include "rotary.h"
#include "vector.cuh"

namespace {

using namespace device;

constexpr int kThreads = 128;

template <typename E>
__device__ __forceinline__ void rotate(const Rotary &a) {
    const bool wide = a.wide;
    const int size = wide ? Vector<E>::kSize : 1, half = static_cast<int>(a.rotated) / 2, head_dim = static_cast<int>(a.head_dim);
    const int turning = half / size, lanes = turning + (head_dim - 2 * half) / size;
    const int place = blockIdx.x * kThreads + threadIdx.x, lane = place % lanes, head = place / lanes;
    if (head >= a.heads + a.kv_heads) return;
    const bool of_query = head < a.heads;
    const int64_t own = of_query ? head : head - a.heads, heads = of_query ? a.heads : a.kv_heads;
    for (int64_t row = blockIdx.y; row < a.batch * a.tokens; row += gridDim.y) {
        const int64_t b = row / a.tokens, t = row % a.tokens;
        const E *const from = of_query
            ? static_cast<const E *>(a.query) + b * a.query_batch + own * a.query_head + t * a.query_token
            : static_cast<const E *>(a.key) + b * a.key_batch + own * a.key_head + t * a.key_token;
        E *const to = static_cast<E *>(of_query ? a.query_out : a.key_out) + ((b * heads + own) * a.tokens + t) * head_dim;
        if (lane >= turning) {
            const int at = 2 * half + (lane - turning) * size;
            store(load(from + at, wide, 1), to + at, wide, 1);
            continue;
        }
        const int at = lane * size, other = half + at;
        const int64_t angle = b * a.angle_batch + t * a.rotated;
        const E *const cosine = static_cast<const E *>(a.cosine) + angle, *const sine = static_cast<const E *>(a.sine) + angle;
        Vector<E> x = load(from + at, wide, 1), y = load(from + other, wide, 1);
        const Vector<E> cos_x = load(cosine + at, wide, 1), cos_y = load(cosine + other, wide, 1);
        const Vector<E> sin_x = load(sine + at, wide, 1), sin_y = load(sine + other, wide, 1);
#pragma unroll
        for (int i = 0; i < Vector<E>::kSize; ++i) {
            const float u = to_float(x.element[i]), v = to_float(y.element[i]);
            const float turned_u = product<E>(-v, to_float(sin_x.element[i])), turned_v = product<E>(u, to_float(sin_y.element[i]));
            from_float(__fadd_rn(product<E>(u, to_float(cos_x.element[i])), turned_u), &x.element[i]);
            from_float(__fadd_rn(product<E>(v, to_float(cos_y.element[i])), turned_v), &y.element[i]);
        }
        store(x, to + at, wide, 1);
        store(y, to + other, wide, 1);
    }
}

}  // namespace
