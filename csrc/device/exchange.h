// How CTAs hand each other the state of a time step: the payload is its own flag.
//
// A buffer with a place for every step is filled with 0xFF before the launch. The producer stores
// each 32-bit word once, relaxed; a consumer polls the words themselves until none is 0xFFFFFFFF.
// Each word vouches for itself, so no order between words, hence no release, is needed. 0xFFFFFFFF
// is a NaN (of float, or two of bfloat16 or float16): a producer that computed just that publishes
// another NaN, so NaNs travel and nothing waits for ever.
//
// Every wait is bounded. A CTA that gives up says so in the launch's abort word, which all waits
// read now and then; the launch then ends early, and kernels/finish.cuh turns the outputs to NaN.
#pragma once

#include "device/numeric.h"

namespace rnnlm {

constexpr uint32_t kNotYet = 0xFFFFFFFFu;
constexpr int kNotYetByte = 0xFF;

// Two 16-bit values, the first in the low half, as the word to publish.
RNNLM_DEVICE uint32_t publishable_pair(uint32_t word) {
  return word == kNotYet ? 0x7FFF7FFFu : word;
}
template <class T>
RNNLM_DEVICE uint32_t publishable(T first, T second) {
  static_assert(kIs16Bit<T>);
  return publishable_pair(first.bits | static_cast<uint32_t>(second.bits) << 16);
}
RNNLM_DEVICE uint32_t publishable(float value) {
  const uint32_t word = ptx::float_bits(value);
  return word == kNotYet ? 0x7FFFFFFFu : word;
}

// kNotYet is the largest word there is: a few maxima tell whether any of many words is missing, in
// less time than as many comparisons take.
RNNLM_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}
RNNLM_DEVICE uint32_t largest_word(const uint4& v) {
  return larger(larger(v.x, v.y), larger(v.z, v.w));
}
RNNLM_DEVICE bool complete(const uint4& v) {
  return largest_word(v) != kNotYet;
}

// The abort word of a launch: 0, or why it gave up.
enum AbortReason : uint32_t { kRunning = 0, kWaitedTooLong = 1 };

// How long a wait may last: at least so many polls and at least so long. (Both, because a process
// that is preempted or debugged loses time without polling.)
struct WaitLimit {
  uint32_t polls;
  uint64_t nanoseconds;
};

// One warp's wait for one set of words. `while (!arrived) if (!wait.again()) give up;`
class Wait {
 public:
  RNNLM_DEVICE Wait(uint32_t* abort_word, const WaitLimit& limit)
      : abort_word_(abort_word), limit_(limit) {}

  // Call after a poll that found something missing. False: stop waiting, the launch is over.
  RNNLM_DEVICE bool again() { return go_on(/*heeds_others=*/true); }
  // The same of a wait for somebody who comes although the launch is over. False: waited too long.
  RNNLM_DEVICE bool again_whatever_others_say() { return go_on(/*heeds_others=*/false); }

 private:
  static constexpr uint32_t kCheckEvery = 1024;

  RNNLM_DEVICE bool go_on(bool heeds_others) {
    ++polls_;
    if (polls_ % kCheckEvery == 0) return check(heeds_others);
    ptx::pause();
    return true;
  }
  RNNLM_DEVICE bool check(bool heeds_others) {
    if (heeds_others && ptx::ld_relaxed(abort_word_) != kRunning) return false;
    const uint64_t now = ptx::nanoseconds();
    if (polls_ == kCheckEvery) started_ = now;
    if (polls_ >= limit_.polls && now - started_ >= limit_.nanoseconds) {
      ptx::st_relaxed(abort_word_, kWaitedTooLong);
      return false;
    }
    return true;
  }

  uint32_t* abort_word_;
  WaitLimit limit_;
  uint32_t polls_ = 0;
  uint64_t started_ = 0;
};

}  // namespace rnnlm
