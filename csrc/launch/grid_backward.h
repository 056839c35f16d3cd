// From a plan to an instance of kernels/grid_backward.cuh. The instances, ten per cell and
// arithmetic (four of plain multiply-adds), are in grid_backward_*.cu: one file each, so that they
// compile side by side.
#pragma once

#include "kernels/grid_backward.cuh"
#include "launch/grid_backward_resources.h"
#include "launch/guard.h"
#include "launch/plan.h"

namespace rnnlm {

// What plan.h and grid_backward_resources.h call a cell.
template <class Backward>
struct PlanCell;
template <class T>
struct PlanCell<LstmGridBackward<T>> {
  static constexpr Cell value = Cell::lstm;
};
template <class T>
struct PlanCell<GruAfterGridBackward<T>> {
  static constexpr Cell value = Cell::gru_after;
};
template <class T>
struct PlanCell<GruBeforeGridBackward<T>> {
  static constexpr Cell value = Cell::gru_before;
};

// Fragments of float32 are as wide as two of TF32.
using GridBackwardFma = HeldFma<32>;

template <class Product>
constexpr GridArithmetic grid_backward_arithmetic() {
  if (kIs16Bit<typename Product::Element>) return GridArithmetic::tensor16;
  return kIsHeldFma<Product> ? GridArithmetic::fma : GridArithmetic::tf32;
}

// kFragments: of the plan.
template <template <class> class CellOf, class Product, int kFragments, int kTiles>
Status launch_grid_backward_as(const GridBackwardParams<typename Product::Element>& params,
                               const CudaCall& call, const GridPlan& plan) {
  constexpr GridArithmetic kArithmetic = grid_backward_arithmetic<Product>();
  constexpr int kHeld = kIsHeldFma<Product> ? grid_backward_fma_fragments(kFragments) : kFragments;
  using Config = GridBackwardConfig<CellOf, Product, kHeld, kTiles>;
  constexpr Cell kCell = PlanCell<typename Config::Cell>::value;
  static_assert(Config::kUnits == kGridUnits && Config::kWarps == kGridWarps);
  static_assert(Config::shared_bytes(8) ==
                grid_backward_shared_bytes(kCell, kArithmetic, kFragments, kTiles, 8));
  static_assert(Config::shared_bytes(40) ==
                grid_backward_shared_bytes(kCell, kArithmetic, kFragments, kTiles, 40));
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(plan.ctas);
  shape.grid_y = static_cast<unsigned>(plan.groups);
  shape.threads = Config::kThreads;
  shape.shared = static_cast<std::size_t>(Config::shared_bytes(plan.rows));
  shape.cooperative = true;
  return launch_persistent("launching the grid tier's backward kernel",
                           &grid_backward_kernel<Config>, shape, call, params);
}

template <template <class> class CellOf, class Product, int kFragments>
Status launch_grid_backward_tiles(const GridBackwardParams<typename Product::Element>& params,
                                  const CudaCall& call, const GridPlan& plan) {
  if constexpr (grid_backward_most_tiles(grid_backward_arithmetic<Product>()) > 1) {
    if (plan.tiles == 2)
      return launch_grid_backward_as<CellOf, Product, kFragments, 2>(params, call, plan);
  }
  return launch_grid_backward_as<CellOf, Product, kFragments, 1>(params, call, plan);
}

// CellOf: LstmGridBackward, GruAfterGridBackward or GruBeforeGridBackward; Product: TensorCore16,
// HeldTf32 or GridBackwardFma. `dgates`, and `candidate` of a GRU with the reset after, have been
// filled.
template <template <class> class CellOf, class Product>
Status launch_grid_backward(const GridBackwardParams<typename Product::Element>& params,
                            const CudaCall& call, const GridPlan& plan) {
  switch (plan.fragments) {
    case 1:
      return launch_grid_backward_tiles<CellOf, Product, 1>(params, call, plan);
    case 2:
      // Those of plain multiply-adds hold as many as with one.
      if constexpr (!kIsHeldFma<Product>)
        return launch_grid_backward_tiles<CellOf, Product, 2>(params, call, plan);
      else
        return launch_grid_backward_tiles<CellOf, Product, 1>(params, call, plan);
    case 4:
      return launch_grid_backward_tiles<CellOf, Product, 4>(params, call, plan);
    case 6:
      return launch_grid_backward_tiles<CellOf, Product, 6>(params, call, plan);
    case 8:
      return launch_grid_backward_tiles<CellOf, Product, 8>(params, call, plan);
    default:
      break;
  }
  return Status::invalid_argument(
      "the grid tier has no backward kernel with " + std::to_string(plan.fragments) + " fragments",
      "Take the plan that choose() makes");
}

#define RNNLM_GRID_BACKWARD(CellOf, Product)             \
  template Status launch_grid_backward<CellOf, Product>( \
      const GridBackwardParams<typename Product::Element>&, const CudaCall&, const GridPlan&)

extern RNNLM_GRID_BACKWARD(LstmGridBackward, TensorCore16<Bf16>);
extern RNNLM_GRID_BACKWARD(LstmGridBackward, TensorCore16<F16>);
extern RNNLM_GRID_BACKWARD(LstmGridBackward, HeldTf32);
extern RNNLM_GRID_BACKWARD(LstmGridBackward, GridBackwardFma);
extern RNNLM_GRID_BACKWARD(GruAfterGridBackward, TensorCore16<Bf16>);
extern RNNLM_GRID_BACKWARD(GruAfterGridBackward, TensorCore16<F16>);
extern RNNLM_GRID_BACKWARD(GruAfterGridBackward, HeldTf32);
extern RNNLM_GRID_BACKWARD(GruAfterGridBackward, GridBackwardFma);
extern RNNLM_GRID_BACKWARD(GruBeforeGridBackward, TensorCore16<Bf16>);
extern RNNLM_GRID_BACKWARD(GruBeforeGridBackward, TensorCore16<F16>);
extern RNNLM_GRID_BACKWARD(GruBeforeGridBackward, HeldTf32);
extern RNNLM_GRID_BACKWARD(GruBeforeGridBackward, GridBackwardFma);

}  // namespace rnnlm
