// The instructions that the instruction set "amx" adds to AVX-512, in software: what Intel's
// manual says that they do, and the end of the process where it says that they fault. Included
// before all else (-include) where csrc/cpu is compiled to run on any CPU with AVX-512.
//
// Stricter than the CPU in two things: a tile has no contents until something is loaded into it (a
// new configuration leaves zeros there, on which nobody should build), and nothing restarts an
// instruction half-way (start_row).
#pragma once

#include <cstdint>

#define RNNLM_EMULATED_AMX

namespace rnnlm::emulated {

// Threads that have a configuration, that is, have not released their tiles.
int threads_with_tiles();

void tile_loadconfig(const void* config);
void tile_release();
void tile_zero(int tile);
void tile_loadd(int tile, const void* base, int64_t stride);
void tile_stored(int tile, void* base, int64_t stride);
void tile_dpbf16ps(int sums, int a, int b);

}  // namespace rnnlm::emulated

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace rnnlm::emulated {
__m512i dpbf16_ps(__m512i sum, __m512i a, __m512i b);
__m256i cvtneps_pbh(__m512i x);
}  // namespace rnnlm::emulated

#define _mm512_dpbf16_ps(sum, a, b) \
  ((__m512)::rnnlm::emulated::dpbf16_ps((__m512i)(sum), (__m512i)(a), (__m512i)(b)))
#define _mm512_cvtneps_pbh(x) ((__m256bh)::rnnlm::emulated::cvtneps_pbh((__m512i)(x)))

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig ::rnnlm::emulated::tile_loadconfig
#define _tile_release ::rnnlm::emulated::tile_release
#define _tile_zero ::rnnlm::emulated::tile_zero
#define _tile_loadd ::rnnlm::emulated::tile_loadd
#define _tile_stored ::rnnlm::emulated::tile_stored
#define _tile_dpbf16ps ::rnnlm::emulated::tile_dpbf16ps
#endif
