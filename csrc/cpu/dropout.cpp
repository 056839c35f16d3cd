// Dropout: numbers times a scale, or times zero where their random number says so. Compiled once
// per instruction set (RNNLM_ISA names it).
//
// PyTorch draws one number after the other, on one thread, which takes longer than everything else
// about a mask. Here the draw of an element follows from the seed and its position alone
// (device/philox.h), so threads split the elements, vectors draw for many at once, and backward
// draws again what forward has drawn instead of reading a mask. Results are the same bits for any
// number of threads and any instruction set.

#include "device/philox.h"
#include "kernels.h"
#include "parallel.h"
#include "vec.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace rnnlm::cpu::RNNLM_ISA {
namespace {

// A word of several evaluations of Philox: the low half of each 64 bits. The other half is whatever
// arithmetic left there.
struct VectorWords {
  typedef uint64_t Word __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 8;

  static RNNLM_INLINE Word product(Word a, uint32_t b) {
#if defined(__AVX512F__)
    // Not _mm512_mul_epu32, for whose undefined lanes, of which there are none, GCC 12 warns.
    return (Word)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (Word)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (Word)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
    return (Word)vmull_n_u32(vmovn_u64((uint64x2_t)a), b);
#else
    return (a & uint64_t{UINT32_MAX}) * uint64_t{b};
#endif
  }
  static RNNLM_INLINE Word low(Word product) { return product; }
};

constexpr int kLanes64 = VectorWords::kLanes;
constexpr int kGroups = 2;                          // of evaluations, to hide latencies
constexpr int kPositions = 4 * kLanes64 * kGroups;  // whose draws are made at a time

// The draws of positions first .. first + kPositions; first is a multiple of 4.
RNNLM_INLINE void draw(uint64_t seed, uint64_t first, uint32_t* words) {
  VectorWords::Word lane;
  for (int l = 0; l < kLanes64; ++l) lane[l] = uint64_t(l);
  for (int group = 0; group < kGroups; ++group) {
    const VectorWords::Word block = lane + (first / 4 + uint64_t(group * kLanes64));
    const Philox<VectorWords> drawn = random_words<VectorWords>(seed, 0, block, block >> 32);
    const uint64_t kLow = UINT32_MAX;
    const VectorWords::Word pairs[2] = {(drawn.word[0] & kLow) | drawn.word[1] << 32,
                                        (drawn.word[2] & kLow) | drawn.word[3] << 32};
    uint64_t lanes[2][kLanes64];
    memcpy(lanes, pairs, sizeof lanes);
    for (int l = 0; l < kLanes64; ++l)
      for (int half = 0; half < 2; ++half)
        memcpy(words + (group * kLanes64 + l) * 4 + half * 2, &lanes[half][l], 8);
  }
}

template <class S>
void run(const Dropout& p) {
  using T = Arithmetic<S>;
  // A thread is worth its start from some microseconds of work on.
  constexpr int64_t kElementsPerThread = 16384;
  const int64_t useful = p.count / kElementsPerThread + 1;
  parallel(
      int(p.threads < useful ? p.threads : useful),
      [](void* context, int thread, int threads) {
        const Dropout& p = *static_cast<const Dropout*>(context);
        const S* x = static_cast<const S*>(p.x);
        S* y = static_cast<S*>(p.y);
        const T scale = T(p.scale);
        const int64_t rounds = (p.count + kPositions - 1) / kPositions;
        const int64_t last = rounds * (thread + 1) / threads * kPositions;
        const int64_t end = last < p.count ? last : p.count;
        for (int64_t i = rounds * thread / threads * kPositions; i < end; i += kPositions) {
          uint32_t words[kPositions];
          draw(p.seed, uint64_t(i), words);
          T scales[kPositions];
          for (int j = 0; j < kPositions; ++j) scales[j] = is_kept(words[j], p.p) ? scale : T(0);
          for (int64_t j = 0; j < kPositions && i + j < end; j += kLanes<T>) {
            const int64_t left = end - i - j;
            store(y + i + j, load(x + i + j, left) * load(scales + j), left);
          }
        }
      },
      const_cast<Dropout*>(&p));
}

}  // namespace

Result dropout(const Dropout& p) {
  switch (p.dtype) {
    case DType::f64:
      run<double>(p);
      break;
    case DType::bf16:
      run<bf16>(p);
      break;
    case DType::f16:
      run<f16>(p);
      break;
    case DType::f32:
      run<float>(p);
      break;
  }
  return Result::ok;
}

}  // namespace rnnlm::cpu::RNNLM_ISA
