// From a plan to an instance of kernels/grid_forward.cuh. The instances, eight per cell and
// arithmetic, are in grid_forward_*.cu: one file each, so that they compile side by side. Those
// whose CTAs gather in pairs, three per cell and 16-bit dtype, are in grid_forward_pairs_*.cu.
#pragma once

#include "kernels/grid_forward.cuh"
#include "launch/grid_forward_resources.h"
#include "launch/guard.h"
#include "launch/plan.h"

namespace rnnlm {

// A fragment as wide as those of TF32.
using GridFma = HeldFma<16>;

template <class Config>
constexpr Cell grid_forward_cell() {
  if (Config::kIsLstm) return Cell::lstm;
  return Config::kExchanges == 2 ? Cell::gru_before : Cell::gru_after;
}

template <class Product>
constexpr GridArithmetic grid_forward_arithmetic() {
  if (kIs16Bit<typename Product::Element>) return GridArithmetic::tensor16;
  return kIsHeldFma<Product> ? GridArithmetic::fma : GridArithmetic::tf32;
}

template <class Config>
Status launch_grid_forward_as(const GridForwardParams<typename Config::T>& params,
                              const CudaCall& call, const GridPlan& plan) {
  constexpr Cell kCell = grid_forward_cell<Config>();
  static_assert(Config::kUnits == kGridUnits && Config::kWarps == kGridWarps);
  constexpr GridArithmetic kArithmetic = grid_forward_arithmetic<typename Config::Product>();
  constexpr int kFragments = Config::kFragments, kTiles = Config::kTiles;
  static_assert(Config::kTogether == kGridFmaRows);
  constexpr bool kPairs = Config::kIsPaired;
  static_assert(Config::shared_bytes(8) ==
                grid_forward_shared_bytes(kCell, kArithmetic, kFragments, kTiles, 8, kPairs));
  static_assert(Config::shared_bytes(40) ==
                grid_forward_shared_bytes(kCell, kArithmetic, kFragments, kTiles, 40, kPairs));
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(plan.ctas);
  shape.grid_y = static_cast<unsigned>(plan.groups);
  shape.threads = Config::kThreads;
  shape.shared = static_cast<std::size_t>(Config::shared_bytes(plan.rows));
  shape.cooperative = true;
  if (kPairs) shape.cluster = 2;
  return launch_persistent("launching the grid tier's forward kernel", &grid_forward_kernel<Config>,
                           shape, call, params);
}

inline Status no_grid_forward(const GridPlan& plan) {
  return Status::invalid_argument("the grid tier has no forward kernel with " +
                                      std::to_string(plan.fragments) + " fragments and " +
                                      std::to_string(plan.tiles) + " tiles",
                                  "Take the plan that choose() makes");
}

// As launch_grid_forward(), of a plan of pairs.
template <template <class> class CellOf, class Product>
Status launch_grid_forward_pairs(const GridForwardParams<typename Product::Element>& params,
                                 const CudaCall& call, const GridPlan& plan) {
  using Pairs = PairedGather;
  switch (10 * plan.fragments + plan.tiles) {
    case 42:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 4, 2, Pairs>>(params, call,
                                                                                     plan);
    case 61:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 6, 1, Pairs>>(params, call,
                                                                                     plan);
    case 81:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 8, 1, Pairs>>(params, call,
                                                                                     plan);
    default:
      return no_grid_forward(plan);
  }
}

#define RNNLM_GRID_FORWARD_PAIRS(CellOf, Product)             \
  template Status launch_grid_forward_pairs<CellOf, Product>( \
      const GridForwardParams<typename Product::Element>&, const CudaCall&, const GridPlan&)

extern RNNLM_GRID_FORWARD_PAIRS(LstmCell, TensorCore16<Bf16>);
extern RNNLM_GRID_FORWARD_PAIRS(LstmCell, TensorCore16<F16>);
extern RNNLM_GRID_FORWARD_PAIRS(GruAfterCell, TensorCore16<Bf16>);
extern RNNLM_GRID_FORWARD_PAIRS(GruAfterCell, TensorCore16<F16>);
extern RNNLM_GRID_FORWARD_PAIRS(GruBeforeCell, TensorCore16<Bf16>);
extern RNNLM_GRID_FORWARD_PAIRS(GruBeforeCell, TensorCore16<F16>);

// CellOf: LstmCell, GruAfterCell or GruBeforeCell; Product: TensorCore16, HeldTf32 or GridFma. The
// tensors that CTAs exchange have been filled.
template <template <class> class CellOf, class Product>
Status launch_grid_forward(const GridForwardParams<typename Product::Element>& params,
                           const CudaCall& call, const GridPlan& plan) {
  if constexpr (kIs16Bit<typename Product::Element>) {
    if (plan.pairs) return launch_grid_forward_pairs<CellOf, Product>(params, call, plan);
  }
  switch (10 * plan.fragments + plan.tiles) {
    case 11:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 1, 1>>(params, call, plan);
    case 12:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 1, 2>>(params, call, plan);
    case 21:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 2, 1>>(params, call, plan);
    case 22:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 2, 2>>(params, call, plan);
    case 41:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 4, 1>>(params, call, plan);
    case 42:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 4, 2>>(params, call, plan);
    case 61:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 6, 1>>(params, call, plan);
    case 81:
      return launch_grid_forward_as<GridForwardConfig<Product, CellOf, 8, 1>>(params, call, plan);
    default:
      return no_grid_forward(plan);
  }
}

#define RNNLM_GRID_FORWARD(CellOf, Product)             \
  template Status launch_grid_forward<CellOf, Product>( \
      const GridForwardParams<typename Product::Element>&, const CudaCall&, const GridPlan&)

extern RNNLM_GRID_FORWARD(LstmCell, TensorCore16<Bf16>);
extern RNNLM_GRID_FORWARD(LstmCell, TensorCore16<F16>);
extern RNNLM_GRID_FORWARD(LstmCell, HeldTf32);
extern RNNLM_GRID_FORWARD(LstmCell, GridFma);
extern RNNLM_GRID_FORWARD(GruAfterCell, TensorCore16<Bf16>);
extern RNNLM_GRID_FORWARD(GruAfterCell, TensorCore16<F16>);
extern RNNLM_GRID_FORWARD(GruAfterCell, HeldTf32);
extern RNNLM_GRID_FORWARD(GruAfterCell, GridFma);
extern RNNLM_GRID_FORWARD(GruBeforeCell, TensorCore16<Bf16>);
extern RNNLM_GRID_FORWARD(GruBeforeCell, TensorCore16<F16>);
extern RNNLM_GRID_FORWARD(GruBeforeCell, HeldTf32);
extern RNNLM_GRID_FORWARD(GruBeforeCell, GridFma);

}  // namespace rnnlm
