// Gathers blocks on a CPU.

#include "cpu.h"
#include "gather.h"

extern "C" int gather_blocks(const Gather *a) {
    constexpr int64_t kPiece = 64;  // blocks that a thread takes at a time
    cpu::parallel_for((a->n + kPiece - 1) / kPiece, a->workers, [&](int64_t piece) {
        for (int64_t i = piece * kPiece; i < std::min(a->n, (piece + 1) * kPiece); ++i) {
            const int64_t block = a->block[i];
            const char *slab = reinterpret_cast<const char *>(a->slab[a->row[i] * a->slabs + block / a->slab_blocks]);
            const char *from = slab + block % a->slab_blocks * a->block_bytes;
            std::memcpy(static_cast<char *>(a->out) + i * a->block_bytes, from, a->block_bytes);
        }
    });
    return 0;
}
