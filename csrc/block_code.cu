// Blocks as codes of 8 or 4 bits: coded on the GPU, and decoded on their way from pinned host memory to the pool. The layout of a
// block and the arithmetic are described in block_code.py; results equal the torch operations there bit by bit.

#include "block_code.h"
#include "gather.cuh"
#include "vector.cuh"

namespace {

using namespace device;
using namespace gather;

constexpr int kOffsetLimit = 127;
// Largest finite number of a type.
template <typename E>
constexpr float kLargest = 3.40282346638528859812e38f;
template <>
constexpr float kLargest<__half> = 65504.f;
template <>
constexpr float kLargest<__nv_bfloat16> = 3.38953138925153547590e38f;

template <int kBits>
struct Layout {
    static constexpr int kUnit = (1 << kBits) / 16;  // steps by which an offset counts
    static constexpr int kCodes = 128 / kBits;       // of 16 bytes

    int tokens, head_dim;

    __device__ int groups() const { return tokens + head_dim; }
    __device__ int numbers() const { return tokens * head_dim; }  // of keys, or of values
    __device__ int head() const { return (3 * groups() + 15) / 16; }  // this and what follows in units of 16 bytes
    __device__ int side() const { return (numbers() + kCodes - 1) / kCodes; }
    __device__ int64_t bytes() const { return 16 * (head() + 2 * static_cast<int64_t>(side())); }
};

// A group's number is step · (code + base).
struct Group {
    float step, base;
};

// The group of a key's channel, or, after `head_dim` of them, of a value's token, from the scales and offsets in shared memory.
template <int kBits>
__device__ __forceinline__ Group group_of(const uint8_t *head, const Layout<kBits> &layout, int group) {
    const uint32_t scale = reinterpret_cast<const uint16_t *>(head)[group];
    const int offset = reinterpret_cast<const signed char *>(head)[2 * layout.groups() + group];
    return {__uint_as_float(scale << 16), static_cast<float>(offset * Layout<kBits>::kUnit)};
}

template <int kBits>
__device__ __forceinline__ void put_group(uint8_t *head, const Layout<kBits> &layout, int group, float low, float high, bool finite) {
    constexpr float kUnit = Layout<kBits>::kUnit;
    float step = fmaxf(__fdiv_rn(__fadd_rn(high, -low), (1 << kBits) - kUnit), __fdiv_rn(fabsf(low), kOffsetLimit * kUnit));
    uint32_t word = (__float_as_uint(step) + 0xffffu) & ~0xffffu;  // rounded up to bf16
    if (!finite || !(step < INFINITY)) word = 0x7fc00000u;
    step = __uint_as_float(word);
    float offset = 0.f;
    if (step > 0.f) offset = floorf(__fadd_rn(__fmul_rn(__fdiv_rn(low, step), 1.f / kUnit), 0.5f / kUnit));
    offset = fminf(fmaxf(offset, -kOffsetLimit - 1.f), kOffsetLimit);
    reinterpret_cast<uint16_t *>(head)[group] = static_cast<uint16_t>(word >> 16);
    reinterpret_cast<signed char *>(head)[2 * layout.groups() + group] = static_cast<signed char>(offset);
}

template <int kBits>
__device__ __forceinline__ uint32_t code_of(float x, const Group &group) {
    if (!(group.step > 0.f)) return 0;
    const int code = __float2int_rn(__fadd_rn(__fdiv_rn(x, group.step), -group.base));
    return static_cast<uint32_t>(min(max(code, 0), (1 << kBits) - 1));
}

__device__ __forceinline__ float number_of(uint32_t code, const Group &group) {
    return __fmul_rn(group.step, static_cast<float>(code) + group.base);  // exact
}

// Stores a decoded number, at most the largest finite one: codes may be half a step above it. NaN stays.
template <typename E>
__device__ __forceinline__ void store_number(float x, E *to) {
    from_float(x > kLargest<E> ? kLargest<E> : x < -kLargest<E> ? -kLargest<E> : x, to);
}

struct Extremes {
    float low = INFINITY, high = -INFINITY;
    bool finite = true;

    __device__ void add(float x) {
        low = fminf(low, x);
        high = fmaxf(high, x);
        finite = finite && fabsf(x) < INFINITY;
    }
};

// Keys or values of a block, tokens `stride` numbers apart.
template <typename E>
struct Side {
    const E *from;
    int64_t stride;

    __device__ float at(int t, int d) const { return to_float(from[t * stride + d]); }
};

// Codes one block, by all threads of a thread block; dynamic shared memory holds its scales and offsets. If `back` is given, keys
// and values (contiguous) are replaced by what the codes decode to.
template <typename E, int kBits>
__device__ __forceinline__ void encode_block(const Layout<kBits> &layout, const Side<E> (&sides)[2], uint4 *code, E *const *back) {
    constexpr int kCodes = Layout<kBits>::kCodes;
    const int T = layout.tokens, D = layout.head_dim, thread = threadIdx.x, threads = blockDim.x;
    const int lane = thread % kWarp, warps = threads / kWarp;
    auto *head = static_cast<uint8_t *>(dynamic_shared());
    for (int d = thread; d < D; d += threads) {
        Extremes of_channel;
        for (int t = 0; t < T; ++t) of_channel.add(sides[0].at(t, d));
        put_group(head, layout, d, of_channel.low, of_channel.high, of_channel.finite);
    }
    for (int t = thread / kWarp; t < T; t += warps) {
        Extremes of_token;
        for (int d = lane; d < D; d += kWarp) of_token.add(sides[1].at(t, d));
        const float low = -warp_max(-of_token.low), high = warp_max(of_token.high);
        const bool finite = __all_sync(kAll, of_token.finite);
        if (lane == 0) put_group(head, layout, D + t, low, high, finite);
    }
    for (int i = 3 * layout.groups() + thread; i < 16 * layout.head(); i += threads) head[i] = 0;
    __syncthreads();
    for (int v = thread; v < layout.head(); v += threads) code[v] = reinterpret_cast<const uint4 *>(head)[v];
    for (int v = thread; v < 2 * layout.side(); v += threads) {
        const bool is_value = v >= layout.side();
        const int first = (is_value ? v - layout.side() : v) * kCodes;
        int t = first / D, d = first % D;
        uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kCodes; ++i) {
            if (first + i >= layout.numbers()) break;
            const Group group = group_of(head, layout, is_value ? D + t : d);
            const uint32_t found = code_of<kBits>(sides[is_value].at(t, d), group);
            word[i * kBits / 32] |= found << (i * kBits % 32);
            if (back != nullptr) store_number(number_of(found, group), &back[is_value][first + i]);
            if (++d == D) d = 0, ++t;
        }
        code[layout.head() + v] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// One thread block a block.
template <typename E, int kBits>
__device__ __forceinline__ void encode_blocks(const Encode &a) {
    const Layout<kBits> layout{static_cast<int>(a.tokens), static_cast<int>(a.head_dim)};
    const int64_t row = blockIdx.y, b = row / a.kv_heads, g = row % a.kv_heads, n = blockIdx.x;
    const Side<E> sides[2] = {
        {static_cast<const E *>(a.key) + b * a.key_sequence + g * a.key_head + n * a.tokens * a.key_token, a.key_token},
        {static_cast<const E *>(a.value) + b * a.value_sequence + g * a.value_head + n * a.tokens * a.value_token, a.value_token},
    };
    auto *code = reinterpret_cast<uint4 *>(a.code + (row * a.blocks + n) * layout.bytes());
    encode_block<E, kBits>(layout, sides, code, nullptr);
}

// Decodes 16 bytes of codes to the numbers from `first` on.
template <typename E, int kBits>
__device__ __forceinline__ void decode_vector(const Layout<kBits> &layout, const uint8_t *head, const uint4 &codes, int first,
                                              bool is_value, E *to) {
    constexpr int kSize = Vector<E>::kSize;
    const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
    const int D = layout.head_dim;
    int t = first / D, d = first % D;
#pragma unroll
    for (int j = 0; j < Layout<kBits>::kCodes; j += kSize) {
        if (first + j >= layout.numbers()) break;  // a whole number of vectors
        Vector<E> out;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const uint32_t code = word[(j + i) * kBits / 32] >> ((j + i) * kBits % 32) & ((1u << kBits) - 1);
            store_number(number_of(code, group_of(head, layout, is_value ? D + t : d)), &out.element[i]);
            if (++d == D) d = 0, ++t;
        }
        store(out, to + first + j, true, kSize);
    }
}

template <typename E, int kBits>
__device__ __forceinline__ void move_coded_blocks(const MoveCoded &a) {
    constexpr int kCodes = Layout<kBits>::kCodes;
    const Move &m = a.move;
    const Layout<kBits> layout{static_cast<int>(a.tokens), static_cast<int>(a.head_dim)};
    const int head_vectors = layout.head(), side = layout.side();
    const int64_t vectors = m.half_bytes / 16;
    auto *head = static_cast<uint8_t *>(dynamic_shared());
    for_each_move(m, [&](int64_t row, int64_t block, int64_t slot) {
        const int64_t to = (row * m.slots + slot) * vectors;
        auto *key = static_cast<uint4 *>(m.key) + to, *value = static_cast<uint4 *>(m.value) + to;
        if (block >= a.length[row / a.kv_heads] / a.tokens) {
            copy_block(static_cast<const uint4 *>(a.open) + 2 * row * vectors, key, value, vectors);
            return;
        }
        const auto *from = reinterpret_cast<const uint4 *>(host_block(m, row, block, layout.bytes()));
        const uint4 *codes = from + head_vectors;
        for (int begin = 0; begin < 2 * side; begin += kThreads * kInFlight) {
            uint4 held[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int v = begin + i * kThreads + threadIdx.x;
                if (v < 2 * side) held[i] = __ldcs(codes + v);
            }
            if (begin == 0) {  // while the codes are on their way
                for (int v = threadIdx.x; v < head_vectors; v += kThreads)
                    reinterpret_cast<uint4 *>(head)[v] = __ldcs(from + v);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int v = begin + i * kThreads + threadIdx.x;
                if (v >= 2 * side) continue;
                const bool is_value = v >= side;
                const int first = (is_value ? v - side : v) * kCodes;
                decode_vector<E, kBits>(layout, head, held[i], first, is_value, reinterpret_cast<E *>(is_value ? value : key));
            }
        }
        __syncthreads();  // the next block's scales and offsets replace this one's
    });
}

template <typename E, int kBits>
__device__ __forceinline__ void append_coded_token(const AppendCoded &a) {
    const Append &p = a.append;
    const NewToken at(p);
    const int64_t block_numbers = p.tokens * a.head_dim;
    write_token(p, at, reinterpret_cast<uint4 *>(static_cast<E *>(a.open) + 2 * at.row * block_numbers));
    if (at.offset != p.tokens - 1 || at.slot < 0) return;
    __syncthreads();  // the slot holds the whole block
    const Layout<kBits> layout{static_cast<int>(p.tokens), static_cast<int>(a.head_dim)};
    const int64_t in_pool = (at.row * p.slots + at.slot) * block_numbers;
    E *const sides[2] = {static_cast<E *>(p.key) + in_pool, static_cast<E *>(p.value) + in_pool};
    const Side<E> from[2] = {{sides[0], a.head_dim}, {sides[1], a.head_dim}};
    char *code = host_block(p, at.row, at.block, layout.bytes());
    encode_block<E, kBits>(layout, from, reinterpret_cast<uint4 *>(code), sides);
}

}  // namespace
