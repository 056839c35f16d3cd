// What the loops of launch/stepwise.h are made of: the walk over the steps, the workspace and the
// launches.
//
// The products read rows of whole 16-byte vectors. State is kept so in the workspace; weights and
// h0 are read in place where they suit (the width a multiple of the vector, the address of 16), and
// are copied with zeros at the ends of rows where they do not. Backward multiplies with transposed
// weights, which are made anew in every call. Nothing else is done once a call: of a single step
// one launch is all there is.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/params.h"
#include "kernels/step_product.cuh"
#include "kernels/transpose.cuh"
#include "launch/guard.h"
#include "launch/launch.h"
#include "launch/plan.h"
#include "launch/tiers.h"

namespace rnnlm::stepwise {

// --- the loop over the steps ---------------------------------------------------------------------

struct StepRows {
  int64_t first = 0;  // row of the per-step tensors where the step begins
  int rows = 0;       // 0: there is no such step
};

// Walks through the steps; `before` and `after` are the neighbours in the order of the walk.
class StepCursor {
 public:
  StepRows before, now, after;

  StepCursor(const Sequence& sequence, Pass pass)
      : sequence_(sequence), descending_(sequence.reverse == (pass == Pass::forward)) {
    if (descending_) {
      first_ = sequence.steps * sequence.batch;
      if (sequence.batch_sizes != nullptr) {
        first_ = 0;
        for (int64_t t = 0; t < sequence.steps; ++t) first_ += sequence.batch_sizes[t];
      }
    }
    now = take();
    after = take();
  }
  void advance() {
    before = now;
    now = after;
    after = take();
  }

 private:
  StepRows take() {
    if (taken_ == sequence_.steps) return {};
    const int64_t t = descending_ ? sequence_.steps - 1 - taken_ : taken_;
    const int64_t rows =
        sequence_.batch_sizes == nullptr ? sequence_.batch : sequence_.batch_sizes[t];
    ++taken_;
    if (descending_) first_ -= rows;
    const StepRows step{first_, static_cast<int>(rows)};
    if (!descending_) first_ += rows;
    return step;
  }

  const Sequence& sequence_;
  bool descending_;
  int64_t taken_ = 0, first_ = 0;
};

// --- workspace -----------------------------------------------------------------------------------

// Hands out pieces of the workspace. Run once on null to learn the size, once to get the pointers.
class Arena {
 public:
  explicit Arena(void* workspace)
      : base_(workspace == nullptr ? nullptr : static_cast<char*>(workspace)) {}
  template <class U>
  U* take(int64_t count) {
    char* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * int64_t(sizeof(U)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<U*>(p);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 256;
  char* base_;
  int64_t used_ = kAbortBytes;
};

// Width of a row that is filled up to whole vectors.
template <class T>
int64_t padded(int64_t width) {
  return (width + kVectorOf<T> - 1) / kVectorOf<T> * kVectorOf<T>;
}

template <class T>
struct ForwardSpace {
  using A = Arithmetic<T>;
  int64_t h_stride, inner_stride;
  T* h[2];               // [B, h_stride]: the h of one step and of the next, in turn
  T* inner = nullptr;    // [B, inner_stride]: h before the projection, or r * h (reset before)
  int64_t padded_bytes;  // of the above, which begin the space
  A* state;              // [B, H]: c or h
  A* z = nullptr;        // [B, H] (reset before)
  T* h0;                 // copies, where the tensor itself does not suit
  T* w_hh;
  T* w_hr = nullptr;
  int64_t bytes;

  // proj: 0 without projection.
  ForwardSpace(void* workspace, Cell cell, int64_t batch, int64_t hidden, int64_t proj) {
    const int64_t width = proj > 0 ? proj : hidden;
    h_stride = padded<T>(width);
    inner_stride = padded<T>(hidden);
    Arena arena(workspace);
    for (T*& each : h) each = arena.take<T>(batch * h_stride);
    if (proj > 0 || cell == Cell::gru_before) inner = arena.take<T>(batch * inner_stride);
    padded_bytes = arena.used() - kAbortBytes;
    state = arena.take<A>(batch * hidden);
    if (cell == Cell::gru_before) z = arena.take<A>(batch * hidden);
    h0 = arena.take<T>(batch * h_stride);
    w_hh = arena.take<T>((cell == Cell::lstm ? 4 : 3) * hidden * h_stride);
    if (proj > 0) w_hr = arena.take<T>(proj * inner_stride);
    bytes = arena.used();
  }
};

template <class T>
struct BackwardSpace {
  using A = Arithmetic<T>;
  int64_t depth;  // k of the product
  int64_t next_stride, inner_depth, inner_stride;
  T* next[2];            // [B, next_stride]: gradients that the next product multiplies, in turn
  T* inner = nullptr;    // [B, inner_stride]: gradient of the projected h, or of n (reset before)
  int64_t padded_bytes;  // of the above, which begin the space
  A* kept;               // [B, H]: dc, or GRU's gradient of h that passes by the product
  T* w_hh;               // [R, next_stride]: W_hh^T; reset before: of r and z
  T* w_inner = nullptr;  // [H, inner_stride]: W_hr^T, or W_hn^T (reset before)
  int64_t bytes;

  BackwardSpace(void* workspace, Cell cell, int64_t batch, int64_t hidden, int64_t proj) {
    depth = (cell == Cell::lstm ? 4 : cell == Cell::gru_after ? 3 : 2) * hidden;
    next_stride = padded<T>(depth);
    inner_depth = proj > 0 ? proj : cell == Cell::gru_before ? hidden : 0;
    inner_stride = padded<T>(inner_depth);
    Arena arena(workspace);
    for (T*& each : next) each = arena.take<T>(batch * next_stride);
    if (inner_depth > 0) inner = arena.take<T>(batch * inner_stride);
    padded_bytes = arena.used() - kAbortBytes;
    kept = arena.take<A>(batch * hidden);
    w_hh = arena.take<T>((proj > 0 ? proj : hidden) * next_stride);
    if (inner_depth > 0) w_inner = arena.take<T>(hidden * inner_stride);
    bytes = arena.used();
  }
};

// --- launches ------------------------------------------------------------------------------------

// How the products of a Step with kRows weight rows a unit may be tiled, narrow to wide. A wider
// tile reads the weights less often; a narrower one keeps more SMs busy and needs fewer registers.
// The units make 16, 32 or 48 weight rows in a narrow tile, 32 to 64 in a wide one.
template <int kRows>
constexpr int kNarrowUnits = kRows % 2 == 0 ? 8 : 16;
template <int kRows>
constexpr int kWideUnits = kRows == 1 ? 32 : 16;
template <class... Tile>
struct TileList {};

template <class Policy, int kRows>
struct TilesOf {  // 8, 32 or 64 batch rows
  using List = TileList<StepTile<kNarrowUnits<kRows>, 1, 1>, StepTile<kWideUnits<kRows>, 2, 2>,
                        StepTile<kWideUnits<kRows>, 4, 2>>;
};
template <int kRows>
struct TilesOf<TensorCoreTf32, kRows> {
  using List = TileList<StepTile<kNarrowUnits<kRows>, 1, 1>, StepTile<kWideUnits<kRows>, 2, 2>>;
};
template <int kRows>
struct TilesOf<StreamedFma, kRows> {  // more units would not find registers for their sums
  using List = TileList<StepTile<kNarrowUnits<kRows>, 1, 1>, StepTile<kNarrowUnits<kRows>, 4, 1>>;
};
template <int kRows>
struct TilesOf<PlainFma<double>, kRows> {  // 16 batch rows
  using List = TileList<StepTile<kNarrowUnits<kRows>, 2, 1>>;
};

// Enqueues the kernels of one call.
template <class T>
class Launcher {
 public:
  explicit Launcher(const CudaCall& call) : call_(call) {}

  Status begin() { return known_limits(call_.device, &limits_); }

  // Zeroes what fills rows up, if any do not end with a vector.
  Status clear_padding(void* space, int64_t bytes, bool wanted) {
    if (!wanted) return Status::ok();
    return fill_bytes(space, 0, static_cast<std::size_t>(bytes), call_.stream);
  }

  // `tensor` [rows, width] itself if a product can read it, else its copy in `space`.
  Status readable(const void* tensor, int64_t rows, int64_t width, T* space, const T** out) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(tensor) % 16 == 0;
    *out = aligned && padded<T>(width) == width ? static_cast<const T*>(tensor) : space;
    if (*out != space) return Status::ok();
    using Traits = LayoutTraits;
    const LayoutParams<T> p{static_cast<const T*>(tensor), space, rows, width, padded<T>(width)};
    LaunchShape shape;
    shape.threads = Traits::kThreads;
    shape.grid_x = ctas(rows * p.stride, Traits::kThreads);
    return launch("launching the copy of weights or states", &pad_kernel<Traits, T>, shape,
                  call_.stream, p);
  }

  // out [columns, padded(rows)] = transposed tensor [rows, columns].
  Status transpose(const T* tensor, int64_t rows, int64_t columns, T* out) {
    using Traits = LayoutTraits;
    const LayoutParams<T> p{tensor, out, rows, columns, padded<T>(rows)};
    LaunchShape shape;
    shape.threads = Traits::kThreads;
    shape.shared = Traits::template kShared<T>;
    shape.grid_x = ctas(p.stride, Traits::kTile);
    shape.grid_y = ctas(columns, Traits::kTile);
    return launch("launching the transposition of weights", &transpose_kernel<Traits, T>, shape,
                  call_.stream, p);
  }

  template <class Step>
  Status step(const char* doing, const typename Step::Params& p) {
    if constexpr (std::is_same_v<T, float>) {
      return call_.allow_tf32 ? with<TensorCoreTf32, Step>(doing, p)
                              : with<StreamedFma, Step>(doing, p);
    } else if constexpr (std::is_same_v<T, double>) {
      return with<PlainFma<double>, Step>(doing, p);
    } else {
      return with<TensorCore16<T>, Step>(doing, p);
    }
  }

 private:
  static unsigned ctas(int64_t count, int64_t each) {
    return static_cast<unsigned>((count + each - 1) / each);
  }

  template <class Policy, class Step>
  Status with(const char* doing, const typename Step::Params& p) {
    return fitting<Policy, Step>(doing, p, typename TilesOf<Policy, Step::kRows>::List{});
  }

  // The narrowest tile that holds all rows, or whose CTAs all find an SM; else the widest.
  template <class Policy, class Step, class Tile, class... Wider>
  Status fitting(const char* doing, const typename Step::Params& p, TileList<Tile, Wider...>) {
    LaunchShape shape;
    shape.grid_x = ctas(p.rows, Tile::kColumns);
    shape.grid_y = ctas(p.product.units, Tile::kUnits);
    if constexpr (sizeof...(Wider) > 0) {
      if (shape.grid_x > 1 && int64_t{shape.grid_x} * shape.grid_y > limits_.sms)
        return fitting<Policy, Step>(doing, p, TileList<Wider...>{});
    }
    using Config = StepConfig<Policy, Tile, Step>;
    shape.threads = Config::kThreads;
    shape.shared = Config::Sums::kBytes;
    shape.programmatic = limits_.compute_capability >= 90 && !first_;
    first_ = false;
    return launch(doing, &step_kernel<Config, Step>, shape, call_.stream, p);
  }

  const CudaCall& call_;
  DeviceLimits limits_;
  bool first_ = true;  // the first step waits for the end of all that is in front of the loop
};

template <class T, class U>
T* at(U* tensor, int64_t row, int64_t width) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + row * width;
}

// The product of a state that is all in one place.
template <class T>
StepProduct<T> product_of(const T* weights, const T* state, int64_t units, int64_t length,
                          int rows) {
  return {weights, state, state, static_cast<int>(units), static_cast<int>(length), rows, rows};
}

}  // namespace rnnlm::stepwise
