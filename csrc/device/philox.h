// Random numbers for kernels whose options draw some (dropout, zoneout, weight drop), without any
// state to keep: Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// A draw is a function of the seed, of what it is for (its stream) and of the position of the
// element that wants it, such as (step * batch + row) * hidden + unit. So the same element gets the
// same number in every tier, in whatever launch layout, forward and again backward, on a GPU and on
// a CPU. Four neighbouring positions share one evaluation: 20 multiplications.
#pragma once

#include <cstdint>

#include "device/gates.h"  // RNNLM_HD

namespace rnnlm {

// One evaluation, in words of 32 bits. What else has a `Word`, a `product` of its low 32 bits and a
// number, all 64 bits of it, and the `low` word of that may be given to philox4x32 as well: vectors
// that hold a word of several evaluations.
struct ScalarWords {
  using Word = uint32_t;
  static RNNLM_HD uint64_t product(Word a, uint32_t b) { return uint64_t{b} * a; }
  static RNNLM_HD Word low(uint64_t product) { return static_cast<Word>(product); }
};

template <class Words>
struct Philox {
  typename Words::Word word[4];
};
using PhiloxWords = Philox<ScalarWords>;

// Word i holds 32 random bits that depend on all of the counter and on the key.
template <class Words = ScalarWords>
RNNLM_HD Philox<Words> philox4x32(Philox<Words> counter, uint32_t key0, uint32_t key1) {
  constexpr int kRounds = 10;
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // golden ratio, sqrt(3) - 1
  typename Words::Word(&c)[4] = counter.word;
  for (int round = 0; round < kRounds; ++round) {
    const auto product0 = Words::product(c[0], kMultiplier0);
    const auto product1 = Words::product(c[2], kMultiplier1);
    c[0] = Words::low(product1 >> 32) ^ c[1] ^ key0;
    c[1] = Words::low(product1);
    c[2] = Words::low(product0 >> 32) ^ c[3] ^ key1;
    c[3] = Words::low(product0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The draws of positions 4 * block to 4 * block + 3. Streams with the same seed are independent.
// `low` and `high` are the words of `block`, of several blocks where Words are vectors.
template <class Words>
RNNLM_HD Philox<Words> random_words(uint64_t seed, uint64_t stream, typename Words::Word low,
                                    typename Words::Word high) {
  using Word = typename Words::Word;
  const Philox<Words> counter{{low, high, Word{} + static_cast<uint32_t>(stream),
                               Word{} + static_cast<uint32_t>(stream >> 32)}};
  return philox4x32<Words>(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}
RNNLM_HD PhiloxWords random_words(uint64_t seed, uint64_t stream, uint64_t block) {
  return random_words<ScalarWords>(seed, stream, static_cast<uint32_t>(block),
                                   static_cast<uint32_t>(block >> 32));
}

// One of the 2^24 multiples of 2^-24 in [0, 1): exact, so the same on every machine.
RNNLM_HD float uniform(uint32_t word) {
  return static_cast<float>(word >> 8) * (1.0f / (1 << 24));
}

// True with probability 1 - p: never for p = 1, always for p = 0.
RNNLM_HD bool is_kept(uint32_t word, float p) {
  return uniform(word) >= p;
}

}  // namespace rnnlm
