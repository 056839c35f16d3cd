// How CTAs of the grid tier come by the h that others have published (kernels/grid_forward.cuh).
//
// PolledGather: every CTA polls every word of its group's rows, into registers. Many rows of wide
// layers wait for that alone: all SMs together read [CTAs of a group] times as much out of L2 as
// there is.
//
// PairedGather: two neighbouring CTAs of a group form a cluster and read each row once. Of the rows
// of a pass, the CTA of rank r copies rows r, r + 2, ... into the shared memory of both (bulk
// copies with multicast, one a row), where two mbarriers count what arrives, of two slots in turn:
//
//   fetch    warp w has row 2w + r of the pass. It polls one word of each of some CTAs, so that of
//            the rows that its CTA fetches each producing CTA is looked at once, and starts the
//            copy when these are there. Words of a CTA appear within a hundred cycles of each
//            other, so that most copies find all they came for; and a look costs a sixteenth (an
//            eighth with 8 rows a pass) of what the words themselves would cost. (Derived.)
//   await    all wait until both halves have landed. With several passes a step, the next pass's
//            copy is started here, to travel while this one is multiplied: its words were published
//            a pass ago at least.
//   examine  who multiplies a vector looks at it, as always: the payload is its own flag. Neither
//            the look nor the mbarrier says that a word is there. A copy goes through the async
//            proxy, which may see less than the poll before it did. What is missing the lane polls
//            where it was published, as with PolledGather. So a copy need not be repeated, and the
//            CTAs of a pair need not agree on what has landed.
//   release  behind the barrier of the CTA its slot may be filled again: it tells its partner, who
//            copies into it too. This arrival is relaxed, for a release is a MEMBAR: what was read
//            has been multiplied and added up before the barrier.
//
// A pair must not part while a copy is under way, as it would land in another CTA's memory. So who
// gives up goes on: it starts its copies without looking and skips what it would wait for, but for
// its partner, until the steps are done. Nobody sees what it computes. A partner who does not come
// at all within the limit of waits is lost, and then the CTA leaves.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "device/exchange.h"
#include "device/product.h"

namespace rnnlm {

RNNLM_DEVICE int smaller(int a, int b) {
  return a < b ? a : b;
}
RNNLM_DEVICE int larger(int a, int b) {
  return a > b ? a : b;
}

// A row of h that a step needs: [hidden].
template <class T>
struct GridRow {
  const T* values;
  bool takes_part;
  bool polled;  // published in this launch, not of the initial state
};

struct PolledGather {
  static constexpr bool kIsPaired = false;
  static constexpr int shared_bytes(int, int) { return 0; }
};
struct PairedGather {
  static constexpr bool kIsPaired = true;
  static constexpr int kMbarrierBytes = 32;
  // Rows are half of the banks apart: a warp's loads of 64 bytes of 8 rows meet nowhere.
  static constexpr int pitch(int fragments) { return 8 * 64 * fragments + 64; }
  static constexpr int shared_bytes(int fragments, int pass_rows) {
    return 2 * pass_rows * pitch(fragments) + kMbarrierBytes;
  }
};

struct NoGridPair {};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A CTA's part in a pair. Warps call its functions as a whole, all of them the same ones, where
// nothing else is said. `slot`: 0 and 1 in turn, from pass to pass.
template <class Config>
class GridPair {
  using T = typename Config::T;
  static constexpr int kPitch = PairedGather::pitch(Config::kFragments);
  static constexpr int kSlotBytes = Config::kPassRows * kPitch;
  static constexpr int kFetched = Config::kPassRows / 2;  // rows
  static_assert(kFetched <= Config::kWarps);

 public:
  RNNLM_DEVICE void begin() {
    if (threadIdx.x == 0) {
      for (const int kind : {kFull, kFree}) {
        for (int slot = 0; slot < 2; ++slot) ptx::mbarrier_init(mbarrier(kind, slot), 1);
      }
      ptx::mbarrier_init_fence();
    }
    // What lies beyond a row stays as it is; weights are 0 there, and a product with NaN is not.
    uint4* vectors = reinterpret_cast<uint4*>(slots());
    for (int i = threadIdx.x; i < 2 * kSlotBytes / 16; i += Config::kThreads)
      vectors[i] = zero_vector();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  // No CTA ends while its partner may copy into it, or arrive there.
  RNNLM_DEVICE void end() {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  // The row of a pass that this warp fetches, if it is one of those that do.
  static RNNLM_DEVICE int fetched_row() { return 2 * warp() + static_cast<int>(rank()); }
  // Vector k of row i of the pass in a slot.
  static RNNLM_DEVICE uint4* copied(int slot, int i, int k) {
    return reinterpret_cast<uint4*>(slots() + slot * kSlotBytes + i * kPitch + k * int(sizeof(T)));
  }

  // Starts the copy of this warp's row, unless it was started before. over: at once.
  template <class Params>
  RNNLM_DEVICE void fetch(const Params& p, int slot, const GridRow<T>& row, bool over) {
    if (started_ || warp() >= kFetched || !row.takes_part) return;
    Wait for_partner(p.abort_word, p.wait_limit);
    bool lost = false;
    while (ptx::warp_any(!lost && !is_free(slot, parity_)))
      lost = ptx::warp_any(!for_partner.again_whatever_others_say());
    if (lost) return;
    Wait wait(p.abort_word, p.wait_limit);
    while (!over && ptx::warp_any(look(p, row) == kNotYet)) over = ptx::warp_any(!wait.again());
    start(p, slot, row);
  }

  // Until the pass of `rows` rows has landed; and starts the copy of the row after it, if that
  // `exists`, is there and has room. False: the partner is lost.
  template <class Params>
  RNNLM_DEVICE bool await(const Params& p, int slot, int rows, bool exists, const GridRow<T>& next,
                          bool over) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(mbarrier(kFull, slot),
                                     static_cast<uint32_t>(rows * p.hidden * int(sizeof(T))));
    }
    const bool looks = exists && !over && warp() < kFetched && next.takes_part;
    const uint32_t seen = looks ? look(p, next) : kNotYet;
    Wait wait(p.abort_word, p.wait_limit);
    bool lost = false;
    while (!ptx::mbarrier_try_wait(mbarrier(kFull, slot), parity_)) {
      lost = !wait.again_whatever_others_say();
      if (lost) break;
    }
    started_ = false;
    // The parity changes after every second slot.
    const uint32_t next_parity = parity_ ^ static_cast<uint32_t>(slot);
    if (looks && !ptx::warp_any(seen == kNotYet || !is_free(slot ^ 1, next_parity))) {
      start(p, slot ^ 1, next);
      started_ = true;
    }
    parity_ = next_parity;
    return !ptx::warp_any(lost);
  }

  // After the barrier behind which nobody reads the slot.
  RNNLM_DEVICE void release(int slot) const {
    if (threadIdx.x == 0)
      ptx::mbarrier_arrive_cluster(ptx::cluster_address(mbarrier(kFree, slot), rank() ^ 1));
  }

 private:
  static constexpr int kFull = 0, kFree = 1;  // mbarriers of a slot

  static RNNLM_DEVICE int warp() { return threadIdx.x / 32; }
  static RNNLM_DEVICE int lane() { return threadIdx.x % 32; }
  static RNNLM_DEVICE uint32_t rank() { return blockIdx.x % 2; }
  static RNNLM_DEVICE unsigned char* slots() {
    return ptx::dynamic_shared() + Config::kGatherOffset;
  }
  static RNNLM_DEVICE uint32_t mbarrier(int kind, int slot) {
    return ptx::shared_address(slots() + 2 * kSlotBytes + 8 * (2 * kind + slot));
  }
  // Whether the partner has read what lay in the slot: from the start, and then once a use.
  RNNLM_DEVICE bool is_free(int slot, uint32_t parity) const {
    return ptx::mbarrier_try_wait(mbarrier(kFree, slot), parity ^ 1);
  }
  // A word of one of the CTAs that publish the row.
  template <class Params>
  RNNLM_DEVICE uint32_t look(const Params& p, const GridRow<T>& row) const {
    const int unit = (lane() * kFetched + warp()) * Config::kUnits;
    if (!row.polled || unit >= p.hidden) return 0;
    return ptx::ld_relaxed(reinterpret_cast<const uint32_t*>(row.values + unit));
  }
  template <class Params>
  RNNLM_DEVICE void start(const Params& p, int slot, const GridRow<T>& row) const {
    if (lane() != 0) return;
    ptx::fence_async_copies();
    ptx::copy_multicast(ptx::shared_address(copied(slot, fetched_row(), 0)), row.values,
                        static_cast<uint32_t>(p.hidden * int(sizeof(T))), mbarrier(kFull, slot),
                        0b11);
  }

  uint32_t parity_ = 0;
  bool started_ = false;  // the copy of the pass to come
};

#else

template <class Config>
class GridPair;

#endif

}  // namespace rnnlm
