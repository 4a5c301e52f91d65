// Arguments of the kernels: one struct per operation, the same for GPU and CPU, each in its own header. The operation's Python
// module declares the same struct; the compiler checks that they agree (`layout.py`).
// Shapes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence, N blocks,
// D head size.
#pragma once
#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif
#ifdef __clang__
#pragma clang diagnostic error "-Wreorder-init-list"  // other compilers always make it one
#endif

enum ElementType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;
template <typename A>
constexpr bool is_pointer = false;
template <typename A>
constexpr bool is_pointer<A *> = true;
template <typename A, typename B>
constexpr bool points_to = same<A, B *> || same<A, const B *>;
