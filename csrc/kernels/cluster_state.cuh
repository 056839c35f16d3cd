// What the kernels of the block and cluster tiers share: how a step's values lie in shared memory,
// how the CTAs of a cluster tell each other that they have arrived, and which rows a step holds.
//
// A cluster (in the block tier: a CTA) runs 8 batch rows, the columns of one tensor-core tile, from
// their first step to their last, and waits for nobody else.
#pragma once

#include "device/exchange.h"
#include "device/product.h"
#include "device/sequence.h"

namespace rnnlm {

constexpr int kClusterRows = kTileColumns;

// Kernels are compiled for every architecture; from sm_90 on their CTAs can form clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// tensor + elements, where the tensor may be null and is then not used.
template <class U>
RNNLM_DEVICE U* advance(U* tensor, int64_t elements) {
#if defined(__CUDA_ARCH__)
  return tensor + elements;  // an integer would not be known to be a global address
#else
  return reinterpret_cast<U*>(reinterpret_cast<uintptr_t>(tensor) +
                              static_cast<uintptr_t>(elements) * sizeof(U));
#endif
}

// --- arithmetic ----------------------------------------------------------------------------------

// TensorCoreTf32 where operands are rounded once, as they are stored, and not in every product.
struct StoredTf32 : TensorCoreTf32 {
  static RNNLM_DEVICE void multiply(float (&d)[4], const uint4& w, const uint4& w8,
                                    const uint4 (&h)[1]) {
    const uint32_t a0[4] = {w.x, w8.x, w.y, w8.y}, b0[2] = {h[0].x, h[0].y};
    const uint32_t a1[4] = {w.z, w8.z, w.w, w8.w}, b1[2] = {h[0].z, h[0].w};
    ptx::mma_tf32(d, a0, b0);
    ptx::mma_tf32(d, a1, b1);
  }
};
// What the product is taken with, of weights and of values that are handed over.
template <class Product>
RNNLM_DEVICE uint4 as_operand(const uint4& w) {
  if constexpr (std::is_same_v<Product, StoredTf32>)
    return uint4{Product::round(w.x), Product::round(w.y), Product::round(w.z),
                 Product::round(w.w)};
  else
    return w;
}
template <class Product>
RNNLM_DEVICE uint32_t as_operand(uint32_t word) {
  return word;
}
template <class Product>
RNNLM_DEVICE float2 as_operand(const float2& word) {
  if constexpr (std::is_same_v<Product, StoredTf32>)
    return float2{ptx::float_from_bits(ptx::to_tf32(word.x)),
                  ptx::float_from_bits(ptx::to_tf32(word.y))};
  else
    return word;
}

// The `Math` policy of the gates: without branches, behind which lanes would wait for each other.
struct Math32 : ScalarMath<float> {
  static RNNLM_DEVICE float tanh(float x) { return tanh_or_sigmoid(true, x); }
};
template <class T>
using GateMath = std::conditional_t<kIs16Bit<T>, Math16, Math32>;

// --- two neighbouring units of a row: one word ---------------------------------------------------

// As they lie in memory: 32 bits of a 16-bit type, 64 of float32.
template <class T>
using Word = std::conditional_t<kIs16Bit<T>, uint32_t, float2>;

template <class T>
RNNLM_DEVICE Word<T> word_of(float first, float second) {
  if constexpr (kIs16Bit<T>)
    return from_arithmetic<T>(first).bits | static_cast<uint32_t>(from_arithmetic<T>(second).bits)
                                                << 16;
  else
    return float2{first, second};
}
template <class T>
RNNLM_DEVICE float value_of(Word<T> word, int e) {
  if constexpr (kIs16Bit<T>)
    return to_arithmetic(T{static_cast<uint16_t>(e == 0 ? word : word >> 16)});
  else
    return e == 0 ? word.x : word.y;
}
template <class T>
RNNLM_DEVICE Word<T> load_word(const T* p) {
  return *reinterpret_cast<const Word<T>*>(p);
}
template <class T>
RNNLM_DEVICE void store_word(T* p, Word<T> word) {
  *reinterpret_cast<Word<T>*>(p) = word;
}
RNNLM_DEVICE void load_floats(const float* p, float (&v)[2]) {
  const float2 pair = *reinterpret_cast<const float2*>(p);
  v[0] = pair.x;
  v[1] = pair.y;
}
RNNLM_DEVICE void store_floats(float* p, const float (&v)[2]) {
  *reinterpret_cast<float2*>(p) = float2{v[0], v[1]};
}

// `yes` where the mask has ones, `no` where it has zeros. A choice that the compiler does not turn
// into a branch, behind which it would compute the gates of one pair after the other.
RNNLM_DEVICE uint32_t blend(uint32_t mask, uint32_t yes, uint32_t no) {
  return ((yes ^ no) & mask) ^ no;
}
RNNLM_DEVICE float blend(uint32_t mask, float yes, float no) {
  return ptx::float_from_bits(blend(mask, ptx::float_bits(yes), ptx::float_bits(no)));
}
RNNLM_DEVICE float2 blend(uint32_t mask, const float2& yes, const float2& no) {
  return float2{blend(mask, yes.x, no.x), blend(mask, yes.y, no.y)};
}

// --- the state operand of the product in shared memory -------------------------------------------
//
// [fragment][8 rows][64 bytes of k]: what the 32 lanes of a warp load as one fragment is 512 bytes
// side by side. Within these, the 16-byte vectors of rows 2 and 3, 4 and 5, 6 and 7 change places,
// so that the words which a warp stores, of 16 units in every second row, lie in different banks.
constexpr int kFragmentBytes = 32 * 16;
template <class T>
constexpr int kFragmentDepth = 4 * kVectorOf<T>;  // k of a fragment

RNNLM_DEVICE int state_vector(int row, int t) {
  return ((4 * row + t) ^ (row & ~1)) * 16;
}
// Byte offset of the word that holds k and k + 1 (k even).
template <class T>
RNNLM_DEVICE int state_word(int k, int row) {
  constexpr int kDepth = kFragmentDepth<T>, kVector = kVectorOf<T>;
  return k / kDepth * kFragmentBytes + state_vector(row, k % kDepth / kVector) +
         k % kVector * int(sizeof(T));
}

// --- exchanges within a cluster ------------------------------------------------------------------
//
// Exchange n is a fixed number of bytes that the CTAs of the cluster store into each other's shared
// memory, counted there by mbarrier n % 2; whoever has waited for it sees them all. Slots and
// mbarriers are used in turn, and nothing else keeps the CTAs together: a kernel must not send its
// part of exchange n + 1 before it has read what it needs of exchange n. Then no CTA can send n +
// 2, which goes to the slot of n, while another still reads there.
template <int kCtas>
class ClusterSignal {
 public:
  static constexpr int kBytes = 16;

  RNNLM_DEVICE ClusterSignal(unsigned char* mbarriers, uint32_t bytes_of_exchange,
                             uint32_t* abort_word, const WaitLimit& limit)
      : bytes_(bytes_of_exchange), abort_word_(abort_word), limit_(limit) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (kCtas > 1) address_ = ptx::shared_address(mbarriers);
#else
    (void)mbarriers;
#endif
  }

  // All threads of the cluster. After it the first exchanges may be sent.
  RNNLM_DEVICE void begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(mbarrier(0), 1);
      ptx::mbarrier_init(mbarrier(1), 1);
      ptx::mbarrier_init_fence();
      arm(0);
      arm(1);
    }
    meet();
#endif
  }

  // Where this CTA's bytes are counted in the CTA `rank`.
  RNNLM_DEVICE uint32_t counter(int n, uint32_t rank) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    return ptx::cluster_address(mbarrier(n), rank);
#else
    return 0;
#endif
  }

  // Returns early when the launch is over; gave_up() tells then.
  RNNLM_DEVICE void wait(int n) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    Wait wait(abort_word_, limit_);
    const uint32_t parity = static_cast<uint32_t>(n >> 1) & 1u;
    while (!ptx::mbarrier_try_wait(mbarrier(n), parity)) {
      if (wait.again()) continue;
      gave_up_ = true;
      return;
    }
    // Exchange n + 2 cannot begin before this warp has sent its part of n + 1.
    if (threadIdx.x == 0) arm(n);
#endif
  }
  // Whether a lane of this warp has given up. All lanes call it.
  RNNLM_DEVICE bool gave_up() const { return ptx::warp_any(gave_up_); }

  // A CTA must not end while others may still store into it.
  RNNLM_DEVICE void end() { meet(); }

 private:
  RNNLM_DEVICE uint32_t mbarrier(int n) const {
    return address_ + 8u * (static_cast<uint32_t>(n) & 1u);
  }
  RNNLM_DEVICE void arm(int n) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    ptx::mbarrier_arrive_expect_tx(mbarrier(n), bytes_);
#endif
  }
  RNNLM_DEVICE void meet() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    ptx::cluster_arrive();
    ptx::cluster_wait();
#endif
  }

  uint32_t address_ = 0, bytes_;
  uint32_t* abort_word_;
  WaitLimit limit_;
  bool gave_up_ = false;
};

RNNLM_DEVICE int rank_in_cluster() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return static_cast<int>(ptx::cluster_rank());
#else
  return 0;
#endif
}

// Stores 16 bytes at `address` of another CTA's shared memory (or of the own) for an exchange.
RNNLM_DEVICE void send_to_cta(uint32_t address, const uint4& v, uint32_t counter) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  ptx::st_async_v4(address, v, counter);
#else
  (void)address, (void)v, (void)counter;
#endif
}
RNNLM_DEVICE uint32_t address_in_cluster(const void* shared, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return ptx::cluster_address(ptx::shared_address(shared), static_cast<uint32_t>(rank));
#else
  (void)shared, (void)rank;
  return 0;
#endif
}

// --- steps ---------------------------------------------------------------------------------------

// How many steps hold row `row`: the first so many of the sequence. Rows behind it are in no
// others, so who runs rows from this one on needs no more steps.
RNNLM_DEVICE int steps_with_row(const DeviceSequence& seq, int row) {
  if (seq.offsets == nullptr) return seq.steps;
  int with = 0, without = seq.steps;  // steps known to hold it, and the first that may not
  while (with < without) {
    const int t = (with + without) / 2;
    if (seq.rows(t) > row)
      with = t + 1;
    else
      without = t;
  }
  return with;
}

// Rows of the i-th of these steps in the order of the recurrence: 0 before the first and behind the
// last; and where they begin in per-step tensors.
RNNLM_DEVICE int rows_of_step(const DeviceSequence& seq, int steps, int i) {
  return i < 0 || i >= steps ? 0 : seq.rows(seq.reverse ? steps - 1 - i : i);
}
RNNLM_DEVICE int64_t first_row_of_step(const DeviceSequence& seq, int steps, int i) {
  return seq.row(seq.reverse ? steps - 1 - i : i, 0);
}
// From the first row of a step to that of the step next to it.
RNNLM_DEVICE int rows_to_next(bool descending, int rows, int rows_of_next) {
  return descending ? -rows_of_next : rows;
}

}  // namespace rnnlm
