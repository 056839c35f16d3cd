// The grid tier's backward pass: one cooperative launch walks through all steps, from the one that
// forward took last to its first, with the weights in registers.
//
// Who owns what. A group of CTAs (blockIdx.y) runs the batch rows `rows` blockIdx.y ... and waits
// for no other group. Within it CTA blockIdx.x owns 16 hidden units: it computes dh of those units,
// does their gates' backward, and so produces 16 units of every gate of dgates. For dh it needs
//
//   dh[b, unit] = sum over k of d[b, k] W_hh[k, unit]      k: rows of W_hh, G*H in all
//
// that is, 16 columns of W_hh, which it loads once, as fragments of 16 units x k, and the
// gradients of all units of the step before (in the order of this pass). Its 8 warps split k.
//
// What is exchanged when. The message is dgates itself (for GRU with the reset after, `candidate`
// carries the part that multiplies W_hn), each word its own flag (device/exchange.h): both tensors
// are filled with kNotYetByte before the launch. LSTM and GRU with the reset after exchange once a
// step. GRU with the reset before exchanges twice: da_n, for q = da_n W_hn, then da_r and da_z.
//
// A pass of a step is 8 * kTiles batch rows; a group with more rows makes several. Of each pass:
//
//   1. before the wait, thread (unit, row) turns what forward saved into slopes: the gradients per
//      unit of dh. Its loads find in L2 what was prefetched two steps ago.
//   2. all warps poll 16-byte vectors of the rows' gradients, which arrive in registers as the B
//      operands of the MMAs; loads of one batch of fragments are under way while another is
//      multiplied. Rows that no CTA writes are not polled. Where float32 must not be rounded there
//      are plain multiply-adds instead (device/fma.h): a batch passes through a window of shared
//      memory, and is of the fewer k the more rows there are.
//   3. partial sums to shared memory, the only __syncthreads of the pass, and the sum over warps.
//   4. dh, a few multiply-adds, and the words to publish. Nothing is released or fenced.
//   5. where gradients of the biases are wanted, the float32 values of what was published are added
//      to sums of the thread's own. They lie in the gaps that keep columns of partial sums in banks
//      of their own: shared memory that costs nothing, where registers are short.
//
// A thread thus sums over all steps of those rows that are the same one of a pass. After the last
// step the CTA adds up the rows of a pass and stores the sums of its units in its group's row of
// `bias_partials`; kernels/bias_grad.cuh adds up the groups.
//
// Sums run in a fixed order. A wait that gives up leaves word in `gave_up`, which all threads read
// after the barrier and then return: nothing is published beyond that step.
#pragma once

#include "device/cell.h"
#include "device/exchange.h"
#include "device/fma.h"
#include "device/product.h"
#include "device/sequence.h"

namespace rnnlm {

// Shapes as in core/params.h; G is the number of gates, A float for 16-bit T.
template <class T>
struct GridBackwardParams {
  DeviceSequence seq;
  int hidden;
  int rows;                         // batch rows of a group
  const T* grad_output;             // [N, H] or null, as the next three
  const T* grad_h_n;                // [B, H]
  const T* grad_c_n;                // [B, H]; LSTM
  const Arithmetic<T>* grad_cells;  // [N, H]; LSTM
  const T* w_hh;                    // [G*H, H]
  const T* initial;                 // [B, H]: LSTM c0, GRU h0
  const Arithmetic<T>* cells;       // [N, H]; LSTM
  const T* output;                  // [N, H]; GRU
  const T* saved;                   // [N, 4H], or [N, 3H] for GRU with the reset before
  T* dgates;                        // [N, G*H], filled with kNotYetByte
  T* candidate;                     // [N, H]; GRU; with the reset after filled likewise
  T* dh0;                           // [B, H], or null, together with dc0: not wanted
  T* dc0;                           // [B, H]; LSTM
  // [groups, kBiasGates * H], or null: not wanted. Each group's sums over its rows and all steps.
  Arithmetic<T>* bias_partials;
  uint32_t* abort_word;
  WaitLimit limit;
};

// One unit of one batch row in one step.
struct GridBackwardElement {
  int64_t row;     // of the step's tensors
  int64_t before;  // row of the step that forward took before; -1: none, the initial state
  int batch_row;
  int unit;
  bool live;   // the step holds the row
  bool joins;  // forward took the row no further than this step
};

// Gradients of an element's gates in the order of their biases, or sums of such: LSTM i, f, g, o;
// GRU r, z, n and, with the reset after, W_hn h + b_hn. 0 where there is no such gate.
struct alignas(16) GridBackwardGates {
  float of[4];
};

// --- what a unit does in a step ------------------------------------------------------------------
//
// Each cell keeps one number per element from step to step (`state`): LSTM dc, GRU the part of dh
// that does not pass through the product. prepare() does all that needs no dh; finish_step() goes
// on from the product and returns the gradients as they were before they were rounded (GRU with the
// reset before: finish_reset() returns r's); finish_row() serves rows whose first step was the step
// before. All lanes of a warp call finish_step() together; elements that are not live change
// nothing, and what is returned of them means nothing.
//
// The rows of W_hh are held in one or two parts: gates 0 .. kFirstGates - 1, then the rest. The
// first part multiplies the first gates of dgates.
//
// Gradients are published as pairs of two neighbouring units: a word of 16-bit types, two of
// float32. Of two gates a and b the lane of the even unit stores the pair of a, that of the odd
// unit the pair of b.

RNNLM_DEVICE bool is_odd(int unit) {
  return (unit & 1) != 0;
}
// Where a lane stores: at_a and at_b are the places of its own unit.
template <class T>
RNNLM_DEVICE T* pair_place(int unit, T* at_a, T* at_b) {
  return is_odd(unit) ? at_b - 1 : at_a;
}
template <class T>
RNNLM_DEVICE void publish_pair(bool live, int unit, T* at, float a, float b) {
  const bool odd = is_odd(unit);
  uint32_t* words = reinterpret_cast<uint32_t*>(at);
  if constexpr (kIs16Bit<T>) {
    const uint32_t own = pair_bits<T>(a, b), other = ptx::shuffle_xor(own, 1);
    const uint32_t word = odd ? other >> 16 | (own & 0xFFFF0000u) : (own & 0xFFFFu) | other << 16;
    if (live) ptx::st_relaxed(words, publishable_pair(word));
  } else {
    const float other = ptx::shuffle_xor(odd ? a : b, 1);
    if (!live) return;
    ptx::st_relaxed(words, publishable(odd ? other : a));
    ptx::st_relaxed(words + 1, publishable(odd ? b : other));
  }
}

template <class T>
struct LstmGridBackward {
  using Params = GridBackwardParams<T>;
  using Math = ScalarMath<float>;
  static constexpr int kGates = 4, kFirstGates = 4;
  static constexpr int kSavedGates = 4, kBiasGates = 4;
  static constexpr int kExchanges = 1;
  static constexpr bool kRestInCandidate = false;

  struct Ready {
    LstmSlopes<float> slope;
    float dh, dc;
    T* i_or_f;
  };
  static RNNLM_DEVICE Ready prepare(const Params& p, const GridBackwardElement& e, float state) {
    const int64_t H = p.hidden, at = e.row * H + e.unit, initial = e.batch_row * H + e.unit;
    const LstmGates<float> gates = saved_lstm_gates(p.saved + e.row * 4 * H, H, e.unit);
    const float c_before =
        e.before < 0 ? to_arithmetic(p.initial[initial]) : p.cells[e.before * H + e.unit];
    T* d = p.dgates + e.row * 4 * H + e.unit;
    Ready ready{lstm_slopes<Math>(gates, c_before, p.cells[at]), load_or_zero(p.grad_output, at),
                load_or_zero(p.grad_cells, at), pair_place(e.unit, d, d + H)};
    if (e.joins) {
      ready.dh += load_or_zero(p.grad_h_n, initial);
      state = load_or_zero(p.grad_c_n, initial);
    }
    ready.dc += state;
    return ready;
  }
  static RNNLM_DEVICE GridBackwardGates finish_step(const Params& p, bool live, int unit,
                                                    const Ready& ready, float product,
                                                    float& state) {
    const LstmSlopes<float>& slope = ready.slope;
    const float dh = product + ready.dh, d_c = Math::fma(dh, slope.h, ready.dc);
    const float i = d_c * slope.i, f = d_c * slope.f, g = d_c * slope.g, o = dh * slope.o;
    publish_pair(live, unit, ready.i_or_f, i, f);
    publish_pair(live, unit, ready.i_or_f + 2 * int64_t{p.hidden}, g, o);
    if (live) state = d_c * slope.c;
    return {{i, f, g, o}};
  }
  static RNNLM_DEVICE void finish_row(const Params& p, int batch_row, int unit, float product,
                                      float state) {
    const int64_t at = int64_t{batch_row} * p.hidden + unit;
    p.dh0[at] = from_arithmetic<T>(product);
    p.dc0[at] = from_arithmetic<T>(state);
  }
  static RNNLM_DEVICE void prefetch_state(const Params& p, int64_t at) {
    ptx::prefetch_l2(p.cells + at);
    if (p.grad_cells != nullptr) ptx::prefetch_l2(p.grad_cells + at);
  }
};

// What both variants of the GRU have in common.
template <class T>
struct GruGridBackward {
  using Params = GridBackwardParams<T>;
  using Math = ScalarMath<float>;
  static constexpr int kGates = 3, kFirstGates = 2;

  static RNNLM_DEVICE float h_before(const Params& p, const GridBackwardElement& e) {
    const int64_t H = p.hidden;
    return to_arithmetic(e.before < 0 ? p.initial[e.batch_row * H + e.unit]
                                      : p.output[e.before * H + e.unit]);
  }
  // dh without the product.
  static RNNLM_DEVICE float known_dh(const Params& p, const GridBackwardElement& e, float state) {
    const int64_t H = p.hidden;
    if (e.joins) state = load_or_zero(p.grad_h_n, e.batch_row * H + e.unit);
    return state + load_or_zero(p.grad_output, e.row * H + e.unit);
  }
  static RNNLM_DEVICE T* dgates(const Params& p, const GridBackwardElement& e) {
    return p.dgates + e.row * 3 * p.hidden + e.unit;
  }
  static RNNLM_DEVICE T* candidate(const Params& p, const GridBackwardElement& e) {
    return p.candidate + e.row * p.hidden + e.unit;
  }
  static RNNLM_DEVICE void finish_row(const Params& p, int batch_row, int unit, float product,
                                      float state) {
    p.dh0[int64_t{batch_row} * p.hidden + unit] = from_arithmetic<T>(product + state);
  }
  static RNNLM_DEVICE void prefetch_state(const Params& p, int64_t at) {
    ptx::prefetch_l2(p.output + at);
  }
};

template <class T>
struct GruAfterGridBackward : GruGridBackward<T> {
  using Base = GruGridBackward<T>;
  using typename Base::Math;
  using typename Base::Params;
  static constexpr int kSavedGates = 4, kBiasGates = 4;
  static constexpr int kExchanges = 1;
  static constexpr bool kRestInCandidate = true;  // W_hn multiplies the gradient of hn

  struct Ready {
    GruUpdateGrad<float> update;  // per unit of dh
    GruAfterGrad<float> reset;    // per unit of da_n
    float dh;
    T* r_or_z;
    T* hn_or_n;  // nobody waits for da_n
  };
  static RNNLM_DEVICE Ready prepare(const Params& p, const GridBackwardElement& e, float state) {
    const int64_t H = p.hidden;
    const T* saved = p.saved + e.row * 4 * H;
    const GruGates<float> gates = saved_gru_gates(saved, H, e.unit);
    T* d = Base::dgates(p, e);
    return {gru_update_backward<Math>(gates.z, gates.n, Base::h_before(p, e), 1.0f),
            gru_reset_after_backward<Math>(gates.r, to_arithmetic(saved[3 * H + e.unit]), 1.0f),
            Base::known_dh(p, e, state), pair_place(e.unit, d, d + H),
            pair_place(e.unit, Base::candidate(p, e), d + 2 * H)};
  }
  static RNNLM_DEVICE GridBackwardGates finish_step(const Params&, bool live, int unit,
                                                    const Ready& ready, float product,
                                                    float& state) {
    const float dh = product + ready.dh, n = dh * ready.update.a_n;
    const float r = n * ready.reset.a_r, z = dh * ready.update.a_z, hn = n * ready.reset.d_hn;
    publish_pair(live, unit, ready.r_or_z, r, z);
    publish_pair(live, unit, ready.hn_or_n, hn, n);
    if (live) state = dh * ready.update.h_direct;
    return {{r, z, n, hn}};
  }
};

template <class T>
struct GruBeforeGridBackward : GruGridBackward<T> {
  using Base = GruGridBackward<T>;
  using typename Base::Math;
  using typename Base::Params;
  static constexpr int kSavedGates = 3, kBiasGates = 3;
  static constexpr int kExchanges = 2;
  static constexpr bool kRestInCandidate = false;

  // First exchange: dh, and from it da_n and da_z.
  struct Ready {
    GruUpdateGrad<float> update;
    float dh;
    T* n_or_z;
  };
  static RNNLM_DEVICE Ready prepare(const Params& p, const GridBackwardElement& e, float state) {
    const int64_t H = p.hidden;
    const GruGates<float> gates = saved_gru_gates(p.saved + e.row * 3 * H, H, e.unit);
    T* d = Base::dgates(p, e);
    return {gru_update_backward<Math>(gates.z, gates.n, Base::h_before(p, e), 1.0f),
            Base::known_dh(p, e, state), pair_place(e.unit, d + 2 * H, d + H)};
  }
  static RNNLM_DEVICE GridBackwardGates finish_step(const Params&, bool live, int unit,
                                                    const Ready& ready, float product,
                                                    float& state) {
    const float dh = product + ready.dh, n = dh * ready.update.a_n, z = dh * ready.update.a_z;
    publish_pair(live, unit, ready.n_or_z, n, z);
    if (live) state = dh * ready.update.h_direct;
    return {{0, z, n, 0}};
  }

  // Second exchange: q, the gradient of r * h, and from it da_r.
  struct ReadyForReset {
    GruBeforeGrad<float> reset;  // per unit of q
    float reset_h;               // r * h
    T* r_or_reset_h;             // nobody waits for r * h
  };
  static RNNLM_DEVICE ReadyForReset prepare_reset(const Params& p, const GridBackwardElement& e) {
    const float saved = to_arithmetic(p.saved[e.row * 3 * p.hidden + e.unit]);
    const float r = kIs16Bit<T> ? Math::sigmoid(saved) : saved, h = Base::h_before(p, e);
    return {gru_reset_before_backward<Math>(r, h, 1.0f), r * h,
            pair_place(e.unit, Base::dgates(p, e), Base::candidate(p, e))};
  }
  static RNNLM_DEVICE GridBackwardGates finish_reset(bool live, int unit,
                                                     const ReadyForReset& ready, float q,
                                                     float& state) {
    const float r = q * ready.reset.a_r;
    publish_pair(live, unit, ready.r_or_reset_h, r, ready.reset_h);
    if (live) state += q * ready.reset.h_direct;
    return {{r, 0, 0, 0}};
  }
};

// --- the kernel ----------------------------------------------------------------------------------

// kGateFragments: fragments that a warp holds of each gate; kTiles: tiles of 8 batch rows a pass.
template <template <class> class CellOf, class ProductOf, int kGateFragments, int kTilesOf>
struct GridBackwardConfig {
  using Product = ProductOf;
  using T = typename Product::Element;
  using Cell = CellOf<T>;
  using Params = GridBackwardParams<T>;
  static_assert(Product::kStateRows == 1, "a lane polls one vector a fragment");

  static constexpr bool kIsFma = kIsHeldFma<Product>;

  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kUnits = kTileRows;
  static constexpr int kTiles = kTilesOf;
  static constexpr int kColumns = kTiles * kTileColumns;

  // Fragments of a warp, and of those the ones of the first part. Warp w's i-th fragment of a part
  // begins at k = (i * kWarps + w) * kStep of the part: the warps end together whatever H is.
  static constexpr int kFragments = Cell::kGates * kGateFragments;
  static constexpr int kFirstPart = Cell::kFirstGates * kGateFragments;
  static constexpr int kSpan = kWarps * Product::kStep;

  // Vectors of a fragment that a lane holds, 16 units x kStep in all.
  static constexpr int kVectors = kUnits * Product::kStep / kVectorOf<T> / 32;

  // 160 registers, which leaves enough for the work on every architecture; fewer with plain
  // multiply-adds, whose sums of 8 rows are 32 and whose loads for the next batch are under way
  // meanwhile. What is beyond them is read from shared memory in each step, while vectors arrive
  // from L2.
  static constexpr int kRoom = (!kIsFma ? 160 : Cell::kExchanges == 1 ? 128 : 112) / (4 * kVectors);
  static constexpr int kInRegisters = kFragments < kRoom ? kFragments : kRoom;
  static constexpr int kInShared = kFragments - kInRegisters;

  // Two batches of four vectors a lane are under way at a time: 32 KB per CTA, what a load's
  // latency and the bandwidth of L2 allow.
  static constexpr int kBatch = 4 / kTiles;

  // Independent sums of a warp: an MMA takes several times as long as the tensor core is busy with
  // it. Two suffice where registers are short; there the loads take longer than the MMAs.
  static constexpr int kChains = (kInRegisters < kRoom ? 4 : 2) / kTiles;

  using Partials = PartialSums<float, kUnits, kColumns, kWarps>;
  // With plain multiply-adds (device/fma.h) a lane holds 4 units of an eighth of the fragment's k,
  // and the lanes of a warp hand each other a batch of gradients through a window of shared memory:
  // 4 rows of 32 vectors, half a row of banks apart from their neighbours.
  static constexpr int kSplits = 8;
  static_assert(!kIsFma || (kTiles == 1 && kVectors == 4 && Product::kStep == 4 * kSplits));
  static constexpr int kSharePitch = 32 + 4;  // vectors
  static constexpr int kShareBytes = kIsFma ? (3 * kSharePitch + 32) * int(sizeof(uint4)) : 0;

  // Of a warp, for a fragment on its way into the registers, in the window or where the partial
  // sums will be; see GridBackward::staged_row.
  static constexpr int kStagingBytes = 512 * kVectors + 32 * (kUnits / kVectorOf<T> - 1);
  static_assert(kIsFma ? kStagingBytes <= kShareBytes
                       : kWarps * kStagingBytes <= 2 * Partials::kBytes);
  static constexpr int kWeightsBytes = kInShared * kThreads * kVectors * int(sizeof(uint4));
  static constexpr int kPassElements = kColumns * kUnits;
  // An odd number of 16-byte vectors: neighbouring threads meet in no bank.
  static constexpr int kParkedBytes = 48;
  static constexpr int kWindowBytes = kWarps * 4 * 16;
  static constexpr RNNLM_HD int passes(int rows) { return (rows + kColumns - 1) / kColumns; }
  static constexpr int64_t shared_bytes(int rows) {
    return kWeightsBytes + kWarps * kShareBytes + kPassElements * kParkedBytes +
           2 * Partials::kBytes + kWindowBytes +
           int64_t{passes(rows)} * kPassElements * int64_t(sizeof(float)) +
           2 * int64_t(sizeof(uint32_t));
  }
};

template <class Config>
class GridBackward {
  using Product = typename Config::Product;
  using Cell = typename Config::Cell;
  using T = typename Config::T;
  using Params = typename Config::Params;
  using Partials = typename Config::Partials;
  static constexpr int kTiles = Config::kTiles;
  static constexpr int kBatch = Config::kBatch;

 public:
  RNNLM_DEVICE explicit GridBackward(const Params& params)
      : p_(params),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        column_((warp_ / 4) * kTileColumns + warp_ % 4 + (lane_ / Config::kUnits) * 4),
        unit_(static_cast<int>(blockIdx.x) * Config::kUnits + lane_ % Config::kUnits),
        first_row_(static_cast<int>(blockIdx.y) * p_.rows),
        end_row_(min(p_.seq.batch, first_row_ + p_.rows)) {
    unsigned char* shared = ptx::dynamic_shared();
    weights_beyond_ = reinterpret_cast<uint4*>(shared) + threadIdx.x;
    shared += Config::kWeightsBytes;
    share_ = reinterpret_cast<uint4*>(shared + warp_ * Config::kShareBytes);
    shared += Config::kWarps * Config::kShareBytes;
    parked_ = shared;
    shared += Config::kPassElements * Config::kParkedBytes;
    partials_ = shared;
    shared += 2 * Partials::kBytes;
    window_ = reinterpret_cast<Step*>(shared) + 4 * warp_;
    static_assert(Config::kWindowBytes == Config::kWarps * 4 * int(sizeof(Step)));
    shared += Config::kWindowBytes;
    state_ = reinterpret_cast<float*>(shared) + threadIdx.x;
    gave_up_ =
        reinterpret_cast<uint32_t*>(shared) + Config::passes(p_.rows) * Config::kPassElements;
  }

  RNNLM_DEVICE void run() {
    if (threadIdx.x < 2) gave_up_[threadIdx.x] = 0;
    RNNLM_NO_UNROLL
    for (int i = -1; i < 2; ++i) {
      find_step(i);
      prefetch_step(step(i));
    }
    load_weights();
    __syncthreads();
    if (p_.bias_partials != nullptr && has_element()) bias_sums(threadIdx.x) = {{0, 0, 0, 0}};

    const bool wants_initial = p_.dh0 != nullptr;
    // After the last step what is left is the gradient of the initial state.
    const int count = p_.seq.steps + (wants_initial ? 1 : 0);
    RNNLM_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      ptx::warp_sync();  // step i + 2 takes the place of step i - 2, which no lane reads any more
      find_step(i + 2);
      prefetch_step(step(i + 2));
      const int now = step(i).rows;
      const int busy = wants_initial ? max(now, step(i - 1).rows) : now;
      RNNLM_NO_UNROLL
      for (int first = first_row_; first < busy; first += Config::kColumns)
        if (!run_pass(i, first)) return;
      if constexpr (Cell::kExchanges == 2) {
        RNNLM_NO_UNROLL
        for (int first = first_row_; first < now; first += Config::kColumns)
          if (!run_reset(i, first)) return;
      }
    }
    if (p_.bias_partials != nullptr) store_bias_partials();
  }

 private:
  struct Step {
    int64_t start;  // row of the per-step tensors where batch row 0 is
    int rows;       // batch rows below this one take part; none before and after the sequence
  };
  // Where a lane's vectors lie, of one tile: those of fragment 0 and of the second part's first
  // one.
  struct Source {
    const T* part[2];
    int k;  // of the first, in its part; beyond the end of all parts where there is nothing to poll
  };
  using Vectors = uint4[kBatch][kTiles];

  static RNNLM_DEVICE int min(int a, int b) { return a < b ? a : b; }
  static RNNLM_DEVICE int max(int a, int b) { return a > b ? a : b; }

  // The i-th step of this pass. Found once, kept by each warp for itself while i - 1 .. i + 2 are
  // needed; all its lanes store the same.
  RNNLM_DEVICE Step& step(int i) const { return window_[i & 3]; }
  RNNLM_DEVICE void find_step(int i) const {
    Step found{0, 0};
    if (i >= 0 && i < p_.seq.steps) {
      const int t = p_.seq.step(p_.seq.steps - 1 - i);
      found = {p_.seq.row(t, 0), min(p_.seq.rows(t), end_row_)};
    }
    step(i) = found;
  }

  RNNLM_DEVICE float& state(int first) const {
    return state_[(first - first_row_) * Config::kUnits];
  }

  // --- weights ---

  // First k of fragment f of warp 0, in its part.
  static RNNLM_DEVICE int fragment_k(int f) {
    return (f < Config::kFirstPart ? f : f - Config::kFirstPart) * Config::kSpan;
  }
  static RNNLM_DEVICE int part_of(int f) { return f < Config::kFirstPart ? 0 : 1; }
  RNNLM_DEVICE int part_length(int part) const {
    return (part == 0 ? Cell::kFirstGates : Cell::kGates - Cell::kFirstGates) * p_.hidden;
  }

  // A fragment is 16 units x kStep rows of W_hh, in memory with the units side by side. Each lane
  // loads kVectors of its vectors.
  RNNLM_DEVICE uint4 load_vector_of(int f, int i) const {
    constexpr int kOfRow = Config::kUnits / kVectorOf<T>;
    const int part = part_of(f), vector = i * 32 + lane_;
    const int k = fragment_k(f) + warp_ * Product::kStep + vector / kOfRow;
    const int unit = static_cast<int>(blockIdx.x) * Config::kUnits + vector % kOfRow * kVectorOf<T>;
    const int64_t H = p_.hidden;
    uint4 loaded = zero_vector();
    if (k < part_length(part) && unit < p_.hidden) {
      const T* row = p_.w_hh + (part * Cell::kFirstGates * H + k) * H;
      loaded = *reinterpret_cast<const uint4*>(row + unit);
    }
    return loaded;
  }
  // Makes of them vectors of one unit and consecutive rows, by way of shared memory. On tensor
  // cores a lane gets units 8 apart, else the 4 units of its slot.
  RNNLM_DEVICE void transpose(uint4 (&fragment)[Config::kVectors]) const {
    constexpr int kOfRow = Config::kUnits / kVectorOf<T>;
    T* staged = Config::kIsFma ? reinterpret_cast<T*>(share_)
                               : reinterpret_cast<T*>(partials_ + warp_ * Config::kStagingBytes);
    ptx::warp_sync();
    RNNLM_UNROLL
    for (int i = 0; i < Config::kVectors; ++i) {
      const int vector = i * 32 + lane_;
      T* column = staged + vector / kOfRow;
      const int unit = vector % kOfRow * kVectorOf<T>;
      const uint4& from = fragment[i];
      const uint32_t words[4] = {from.x, from.y, from.z, from.w};
      RNNLM_UNROLL
      for (int e = 0; e < kVectorOf<T>; ++e) {
        T& to = column[staged_row(unit + e)];
        if constexpr (kIs16Bit<T>)
          to.bits = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
        else
          to = ptx::float_from_bits(words[e]);
      }
    }
    ptx::warp_sync();
    RNNLM_UNROLL
    for (int i = 0; i < Config::kVectors; ++i) {
      const int unit = Config::kIsFma ? slot() * 4 + i : i * 8 + lane_g(lane_);
      const int k = Config::kIsFma ? split() * kVectorOf<T> : Product::k_of(lane_);
      fragment[i] = *reinterpret_cast<const uint4*>(staged + staged_row(unit) + k);
      if constexpr (std::is_same_v<Product, HeldTf32>)
        fragment[i] = Product::round_weights(fragment[i]);
    }
  }
  // Where a unit's k lie. Between units whose vectors are stored side by side lie as many bytes as
  // the store fills of a row of banks.
  static RNNLM_DEVICE int staged_row(int unit) {
    constexpr int kGap = 32 / int(sizeof(T));
    return unit * Product::kStep + unit / kVectorOf<T> * kGap;
  }
  // As many at a time as have their loads under way together: more would cost too many registers
  // for addresses.
  template <int kCount>
  RNNLM_DEVICE void load_fragments(int first, uint4 (*fragments)[Config::kVectors]) const {
    RNNLM_UNROLL
    for (int i = 0; i < kCount; ++i) {
      RNNLM_UNROLL
      for (int v = 0; v < Config::kVectors; ++v) fragments[i][v] = load_vector_of(first + i, v);
    }
    RNNLM_UNROLL
    for (int i = 0; i < kCount; ++i) transpose(fragments[i]);
  }
  RNNLM_DEVICE void load_weights() {
    constexpr int kTogether = 8 / Config::kVectors, kRest = Config::kInRegisters % kTogether;
    RNNLM_UNROLL
    for (int f = 0; f + kTogether <= Config::kInRegisters; f += kTogether)
      load_fragments<kTogether>(f, weights_ + f);
    load_fragments<kRest>(Config::kInRegisters - kRest, weights_ + Config::kInRegisters - kRest);
    constexpr int kBeside = 4 / Config::kVectors;  // the registers are full of weights by now
    static_assert(Config::kInShared % kBeside == 0);
    RNNLM_NO_UNROLL
    for (int i = 0; i < Config::kInShared; i += kBeside) {
      uint4 fragments[kBeside][Config::kVectors];
      load_fragments<kBeside>(Config::kInRegisters + i, fragments);
      RNNLM_UNROLL
      for (int j = 0; j < kBeside; ++j) {
        uint4* to = weights_beyond_ + (i + j) * Config::kVectors * Config::kThreads;
        RNNLM_UNROLL
        for (int v = 0; v < Config::kVectors; ++v) to[v * Config::kThreads] = fragments[j][v];
      }
    }
  }

  // --- loads ahead ---

  // By warps that have no element, where there are any: the others prepare theirs meanwhile.
  RNNLM_DEVICE void prefetch_step(const Step& step) const {
    constexpr int kPrefetchingWarps = Config::kPassElements / 32;
    if (warp_ < Config::kWarps - kPrefetchingWarps || unit_ >= p_.hidden) return;
    const int64_t H = p_.hidden;
    RNNLM_NO_UNROLL
    for (int b = first_row_ + column_ % Config::kColumns; b < step.rows; b += Config::kColumns) {
      const int64_t row = step.start + b, at = row * H + unit_;
      const T* saved = p_.saved + row * Cell::kSavedGates * H + unit_;
      RNNLM_UNROLL
      for (int gate = 0; gate < Cell::kSavedGates; ++gate) ptx::prefetch_l2(saved + gate * H);
      Cell::prefetch_state(p_, at);
      if (p_.grad_output != nullptr) ptx::prefetch_l2(p_.grad_output + at);
    }
  }

  // --- the product ---

  // Of batch rows `first` .. of a step, those below `end`.
  RNNLM_DEVICE Source source_of(const Step& step, int first, int end, int tile) const {
    return source_of_row(step, first + tile * kTileColumns + Product::state_row(lane_, 0), end,
                         warp_ * Product::kStep + Product::k_of(lane_));
  }
  RNNLM_DEVICE Source source_of_row(const Step& step, int b, int end, int k) const {
    const int64_t H = p_.hidden, row = step.start + b;
    const T* dgates = p_.dgates + row * Cell::kGates * H + k;
    const T* rest =
        Cell::kRestInCandidate ? p_.candidate + row * H + k : dgates + Cell::kFirstGates * H;
    constexpr int kNowhere = 1 << 30;
    return {{dgates, rest}, b < end ? k : kNowhere};
  }
  RNNLM_DEVICE bool polls(const Source& source, int f) const {
    return source.k < part_length(part_of(f)) - fragment_k(f);
  }

  // Polls fragment f of the tile.
  static RNNLM_DEVICE uint4 poll(const Source& source, int f) {
    return ptx::ld_relaxed_v4(
        reinterpret_cast<const uint4*>(source.part[part_of(f)] + fragment_k(f)));
  }
  // Of fragments kBegin .. kEnd - 1: the first poll of batch `batch`. What is beyond the matrix or
  // not to be polled is zero, and complete.
  template <int kBegin, int kEnd>
  RNNLM_DEVICE void poll_first(Vectors& vectors, int batch, const Source (&source)[kTiles]) const {
    RNNLM_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      const int f = kBegin + batch * kBatch + j;
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        vectors[j][tile] = zero_vector();
        if (f < kEnd && polls(source[tile], f)) vectors[j][tile] = poll(source[tile], f);
      }
    }
  }
  template <int kBegin, int kEnd>
  static RNNLM_DEVICE void poll_missing(Vectors& vectors, int batch,
                                        const Source (&source)[kTiles]) {
    RNNLM_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      const int f = kBegin + batch * kBatch + j;
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile)
        if (f < kEnd && !complete(vectors[j][tile])) vectors[j][tile] = poll(source[tile], f);
    }
  }
  static RNNLM_DEVICE bool all_complete(const Vectors& vectors) {
    uint32_t largest = 0;
    RNNLM_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile)
        largest = larger(largest, largest_word(vectors[j][tile]));
    }
    return largest != kNotYet;
  }
  // Whether any warp has anything in the batch: H may be smaller than the fragments allow.
  template <int kBegin, int kEnd>
  RNNLM_DEVICE bool holds_weights(int batch) const {
    bool any = false;
    RNNLM_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      const int f = kBegin + batch * kBatch + j;
      if (f < kEnd) any = any || fragment_k(f) < part_length(part_of(f));
    }
    return any;
  }

  RNNLM_DEVICE uint4 weights(int f, int vector) const {
    if (f < Config::kInRegisters) return weights_[f][vector];
    return weights_beyond_[((f - Config::kInRegisters) * Config::kVectors + vector) *
                           Config::kThreads];
  }

  // This warp's part of the product of fragments kBegin .. kEnd - 1 with what `source` has.
  // False: gave up waiting.
  template <int kBegin, int kEnd>
  RNNLM_DEVICE bool multiply(const Source (&source)[kTiles], float (&sum)[kTiles][4]) const {
    constexpr int kBatches = (kEnd - kBegin + kBatch - 1) / kBatch;
    float d[Config::kChains][kTiles][4] = {};
    Vectors vectors[2];
    poll_first<kBegin, kEnd>(vectors[0], 0, source);
    poll_first<kBegin, kEnd>(vectors[1], 1, source);
    RNNLM_UNROLL
    for (int batch = 0; batch < kBatches; ++batch) {
      Vectors& here = vectors[batch % 2];
      Vectors& ahead = vectors[(batch + 1) % 2];
      if (holds_weights<kBegin, kEnd>(batch)) {
        if (ptx::warp_any(!all_complete(here))) {
          Wait wait(p_.abort_word, p_.limit);
          do {
            if (ptx::warp_any(!wait.again())) return false;
            poll_missing<kBegin, kEnd>(here, batch, source);
            poll_missing<kBegin, kEnd>(ahead, batch + 1, source);
          } while (ptx::warp_any(!all_complete(here)));
        }
        RNNLM_UNROLL
        for (int j = 0; j < kBatch; ++j) {
          const int f = kBegin + batch * kBatch + j;
          if (f >= kEnd) break;
          const uint4 low = weights(f, 0), high = weights(f, 1);
          RNNLM_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint4 state[1] = {here[j][tile]};
            Product::multiply(d[f % Config::kChains][tile], low, high, state);
          }
        }
      }
      poll_first<kBegin, kEnd>(here, batch + 2, source);
    }
    RNNLM_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      RNNLM_UNROLL
      for (int i = 0; i < 4; ++i) {
        sum[tile][i] = d[0][tile][i];
        RNNLM_UNROLL
        for (int chain = 1; chain < Config::kChains; ++chain) sum[tile][i] += d[chain][tile][i];
      }
    }
    return true;
  }

  // --- the product with plain multiply-adds ---
  //
  // For 1, 2, 4 or 8 rows: a batch is 128 vectors of them, four a lane, and the fewer rows the more
  // k. What has arrived goes into the warp's window, the loads of the next batch set out, and all
  // lanes read from the window what their weights are to be multiplied by.

  RNNLM_DEVICE int slot() const { return lane_ % 4; }   // of units: 4 slot .. 4 slot + 3
  RNNLM_DEVICE int split() const { return lane_ / 4; }  // of a fragment's k

  using Batch = uint4[4];

  // Where the lane's vectors of a batch lie: `kOfRow` of a row are loaded together, of which this
  // lane's is one of the same in each load.
  template <int kOfRow>
  RNNLM_DEVICE Source source_of_batch(const Step& step, int first, int end) const {
    const int vector = lane_ % kOfRow;
    return source_of_row(step, first + lane_ / kOfRow, end,
                         warp_ * Product::kStep + vector / Config::kSplits * Config::kSpan +
                             vector % Config::kSplits * kVectorOf<T>);
  }
  // The i-th of them, null if there is nothing to poll.
  template <int kBegin, int kEnd, int kRows>
  RNNLM_DEVICE const uint4* place_in_batch(const Source& source, int batch, int i) const {
    constexpr int kOfRow = 32 / kRows;
    constexpr int kFragmentsOfLoad = kOfRow > Config::kSplits ? kOfRow / Config::kSplits : 1;
    const int vector = (batch * 4 + i) * kOfRow, f = kBegin + vector / Config::kSplits;
    bool rest = f >= Config::kFirstPart;
    if (kEnd > Config::kFirstPart && !rest && f + kFragmentsOfLoad > Config::kFirstPart)
      rest = f + lane_ % kOfRow / Config::kSplits >= Config::kFirstPart;
    const int k = (rest ? f - Config::kFirstPart : f) * Config::kSpan +
                  vector % Config::kSplits * kVectorOf<T>;
    if (f >= kEnd || source.k >= part_length(rest ? 1 : 0) - k) return nullptr;
    return reinterpret_cast<const uint4*>((rest ? source.part[1] : source.part[0]) + k);
  }
  template <int kBegin, int kEnd, int kRows>
  RNNLM_DEVICE void poll_batch(Batch& vectors, int batch, const Source& source) const {
    RNNLM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint4* place = place_in_batch<kBegin, kEnd, kRows>(source, batch, i);
      vectors[i] = place != nullptr ? ptx::ld_relaxed_v4(place) : zero_vector();
    }
  }
  static RNNLM_DEVICE bool is_complete(const Batch& vectors) {
    return larger(larger(largest_word(vectors[0]), largest_word(vectors[1])),
                  larger(largest_word(vectors[2]), largest_word(vectors[3]))) != kNotYet;
  }
  // Whether a fragment reaches into the matrix: H may be smaller than the fragments allow.
  RNNLM_DEVICE bool holds_weights_of(int f) const {
    return fragment_k(f) < part_length(part_of(f));
  }

  // This warp's part of the product of fragments kBegin .. kEnd - 1 with rows `first` .. of a step,
  // into the partial sums. False: gave up waiting.
  template <int kBegin, int kEnd, int kRows>
  RNNLM_DEVICE bool multiply_rows(const Step& from, int first, int end) const {
    constexpr int kOfRow = 32 / kRows, kOfBatch = 4 * kOfRow / Config::kSplits;  // fragments
    constexpr int kBatches = (kEnd - kBegin + kOfBatch - 1) / kOfBatch;
    const Source source = source_of_batch<kOfRow>(from, first, end);
    // Of the window's first row: this lane's part of fragment 0.
    const uint4* own = share_ + (kOfRow < Config::kSplits
                                     ? split() / kOfRow * Config::kSharePitch + split() % kOfRow
                                     : split());
    float d[kRows][4] = {};
    Batch vectors;
    poll_batch<kBegin, kEnd, kRows>(vectors, 0, source);
    RNNLM_UNROLL
    for (int batch = 0; batch < kBatches; ++batch) {
      if (ptx::warp_any(!is_complete(vectors))) {
        Wait wait(p_.abort_word, p_.limit);
        do {
          if (ptx::warp_any(!wait.again())) return false;
          RNNLM_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (!complete(vectors[i]))
              vectors[i] =
                  ptx::ld_relaxed_v4(place_in_batch<kBegin, kEnd, kRows>(source, batch, i));
          }
        } while (ptx::warp_any(!is_complete(vectors)));
      }
      ptx::warp_sync();  // all have read what lay there
      RNNLM_UNROLL
      for (int i = 0; i < 4; ++i) share_[i * Config::kSharePitch + lane_] = vectors[i];
      ptx::warp_sync();
      if (batch + 1 < kBatches) poll_batch<kBegin, kEnd, kRows>(vectors, batch + 1, source);
      RNNLM_UNROLL
      for (int i = 0; i < kOfBatch; ++i) {
        const int f = kBegin + batch * kOfBatch + i;
        if (f >= kEnd) break;
        if (!holds_weights_of(f)) continue;
        const int vector = i * Config::kSplits;
        const uint4* part = own + vector / kOfRow * Config::kSharePitch + vector % kOfRow;
        uint4 w[4];
        RNNLM_UNROLL
        for (int u = 0; u < 4; ++u) w[u] = weights(f, u);
        RNNLM_UNROLL
        for (int row = 0; row < kRows; ++row) {
          const uint4 state = part[row * kOfRow];
          RNNLM_UNROLL
          for (int u = 0; u < 4; ++u) multiply_add(d[row][u], w[u], state);
        }
      }
    }
    int column = 0;
    bool keeps = true;
    add_splits<kRows, 16, 32 / Config::kSplits>(d, lane_, column, keeps);
    if (keeps) {
      float* to = partials().sums + warp_ * Partials::place_of_sum(0, Config::kColumns) +
                  Partials::place_of_sum(4 * slot(), column);
      *reinterpret_cast<uint4*>(to) = uint4{ptx::float_bits(d[0][0]), ptx::float_bits(d[0][1]),
                                            ptx::float_bits(d[0][2]), ptx::float_bits(d[0][3])};
    }
    return true;
  }
  // The same, for as many rows as there are.
  template <int kBegin, int kEnd>
  RNNLM_DEVICE bool multiply_rows(const Step& from, int first, int end) const {
    if (end - first > 4) return multiply_rows<kBegin, kEnd, 8>(from, first, end);
    if (end - first > 2) return multiply_rows<kBegin, kEnd, 4>(from, first, end);
    if (end - first > 1) return multiply_rows<kBegin, kEnd, 2>(from, first, end);
    return multiply_rows<kBegin, kEnd, 1>(from, first, end);
  }

  // --- passes ---

  // Registers are for weights: what a thread prepares before a wait lies in shared memory
  // meanwhile.
  template <class Ready>
  struct Parked {
    Ready ready;
    bool live, joins;
  };
  template <class Ready>
  RNNLM_DEVICE Parked<Ready>& parked() const {
    static_assert(sizeof(Parked<Ready>) <= Config::kParkedBytes);
    return *reinterpret_cast<Parked<Ready>*>(parked_ + threadIdx.x * Config::kParkedBytes);
  }
  // Whether this warp's threads have elements.
  RNNLM_DEVICE bool has_element() const { return warp_ < Config::kPassElements / 32; }
  // This thread's element of the pass that begins with row `first` of step `now`.
  RNNLM_DEVICE GridBackwardElement element(int first, const Step& done, const Step& now,
                                           const Step& next) const {
    const int b = first + column_;
    return {now.start + b, b < next.rows ? next.start + b : -1, b,
            unit_,         unit_ < p_.hidden && b < now.rows,   b >= done.rows};
  }

  // The product for rows `first` .. of a step, those below `end`, as partial sums of the warps.
  // They lie in one of two sets: while one is read, warps that are ahead write the other. The
  // caller leaves if a warp gave up.
  template <int kBegin, int kEnd>
  RNNLM_DEVICE void compute_partials(const Step& from, int first, int end) {
    parity_ ^= 1;
    bool arrived = true;
    if constexpr (Config::kIsFma) {
      arrived = multiply_rows<kBegin, kEnd>(from, first, end);
    } else {
      Source source[kTiles];
      RNNLM_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) source[tile] = source_of(from, first, end, tile);
      float sum[kTiles][4] = {};
      arrived = multiply<kBegin, kEnd>(source, sum);
      if (arrived) {
        RNNLM_UNROLL
        for (int tile = 0; tile < kTiles; ++tile)
          partials().store(warp_, lane_, 0, tile, sum[tile]);
      }
    }
    if (!arrived && lane_ == 0) gave_up_[parity_] = 1;
    __syncthreads();
  }
  RNNLM_DEVICE Partials partials() const {
    return {reinterpret_cast<float*>(partials_ + parity_ * Partials::kBytes)};
  }
  RNNLM_DEVICE float product() const { return partials().sum(lane_ % Config::kUnits, column_); }

  // Rows `first` .. of the i-th step: dh and what follows from it. Rows that ended with the step
  // before are finished. False: leave.
  RNNLM_DEVICE bool run_pass(int i, int first) {
    using Ready = typename Cell::Ready;
    const Step done = step(i - 1), now = step(i);
    if (has_element()) {
      const Step next = step(i + 1);
      const GridBackwardElement e = element(first, done, now, next);
      if (e.live) parked<Ready>().ready = Cell::prepare(p_, e, state(first));
      parked<Ready>().live = e.live;
      parked<Ready>().joins = e.joins;
    }
    const bool waits = first < done.rows;
    if (waits) {
      constexpr int kEnd = Cell::kExchanges == 1 ? Config::kFragments : Config::kFirstPart;
      const int end = p_.dh0 != nullptr ? done.rows : min(done.rows, now.rows);
      compute_partials<0, kEnd>(done, first, end);
    }
    const bool leave = waits && gave_up_[parity_] != 0;
    if (!has_element()) return !leave;
    const Parked<Ready> mine = parked<Ready>();
    float dh = waits ? product() : 0.0f;
    if (leave) return false;
    if (mine.joins) dh = 0;
    add_to_biases(mine.live, Cell::finish_step(p_, mine.live, unit_, mine.ready, dh, state(first)));
    if (!mine.live && !mine.joins && p_.dh0 != nullptr && unit_ < p_.hidden)
      Cell::finish_row(p_, first + column_, unit_, dh, state(first));
    return true;
  }

  // The second exchange of a step of the GRU with the reset before. False: leave.
  RNNLM_DEVICE bool run_reset(int i, int first) {
    using Ready = typename Cell::ReadyForReset;
    const Step now = step(i);
    if (has_element()) {
      const GridBackwardElement e = element(first, now, now, step(i + 1));
      if (e.live) parked<Ready>().ready = Cell::prepare_reset(p_, e);
      parked<Ready>().live = e.live;
    }
    compute_partials<Config::kFirstPart, Config::kFragments>(now, first, now.rows);
    const bool leave = gave_up_[parity_] != 0;
    if (!has_element()) return !leave;
    const Parked<Ready> mine = parked<Ready>();
    const float q = product();
    if (leave) return false;
    add_to_biases(mine.live, Cell::finish_reset(mine.live, unit_, mine.ready, q, state(first)));
    return true;
  }

  // --- gradients of the biases ---

  // What a thread with an element has added up. Behind the 16 units of each column of the partial
  // sums lie 4 floats that are none: in both sets together, as many as there are elements.
  RNNLM_DEVICE GridBackwardGates& bias_sums(int thread) const {
    static_assert(sizeof(GridBackwardGates) ==
                  (Partials::kStride - Config::kUnits) * sizeof(float));
    static_assert(2 * Config::kWarps * Config::kColumns == Config::kPassElements);
    float* column = reinterpret_cast<float*>(partials_) + thread * Partials::kStride;
    return *reinterpret_cast<GridBackwardGates*>(column + Config::kUnits);
  }
  RNNLM_DEVICE void add_to_biases(bool live, const GridBackwardGates& gates) const {
    if (!live || p_.bias_partials == nullptr) return;
    GridBackwardGates sums = bias_sums(threadIdx.x);
    RNNLM_UNROLL
    for (int gate = 0; gate < Cell::kBiasGates; ++gate) sums.of[gate] += gates.of[gate];
    bias_sums(threadIdx.x) = sums;
  }
  // Half a warp adds up a gate, a lane a unit: over the threads that have it, each of them half a
  // warp from the next.
  RNNLM_DEVICE void store_bias_partials() const {
    __syncthreads();
    const int thread = lane_ % Config::kUnits;
    const int gate = static_cast<int>(threadIdx.x) / Config::kUnits;
    if (gate >= Cell::kBiasGates || unit_ >= p_.hidden) return;
    float sum = bias_sums(thread).of[gate];
    RNNLM_UNROLL
    for (int i = 1; i < Config::kColumns; ++i)
      sum += bias_sums(thread + i * Config::kUnits).of[gate];
    const int64_t row = int64_t{blockIdx.y} * Cell::kBiasGates + gate;
    p_.bias_partials[row * p_.hidden + unit_] = sum;
  }

  const Params& p_;
  const int warp_, lane_;
  const int column_;  // of a pass: whose element this thread has, together with
  const int unit_;    // its hidden unit
  const int first_row_, end_row_;
  int parity_ = 0;

  uint4 weights_[Config::kInRegisters][Config::kVectors];
  // In shared memory: the thread's other fragments; the warp's window of gradients, for plain
  // multiply-adds; what threads prepare before a wait; partial sums, twice; the warp's window of
  // steps; the thread's state of each pass; whether a warp gave up waiting, once for each set of
  // partial sums.
  uint4* weights_beyond_;
  uint4* share_;
  unsigned char* parked_;
  unsigned char* partials_;
  Step* window_;
  float* state_;
  uint32_t* gave_up_;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    grid_backward_kernel(typename Config::Params params) {
  GridBackward<Config>(params).run();
}

}  // namespace rnnlm
