// From a plan to an instance of kernels/cluster_forward.cuh or cluster_backward.cuh. The instances
// of each cell and dtype are in cluster_*.cu: one file each, so that they compile side by side.
#pragma once

#include "kernels/cluster_backward.cuh"
#include "kernels/cluster_forward.cuh"
#include "launch/cluster_resources.h"
#include "launch/guard.h"
#include "launch/plan.h"

namespace rnnlm {

// What the two passes call a cell.
struct ClusterLstm {
  static constexpr Cell kCell = Cell::lstm;
  template <class T>
  using Forward = LstmUnit<T>;
  template <class T>
  using Backward = LstmGradient<T>;
};
struct ClusterGruAfter {
  static constexpr Cell kCell = Cell::gru_after;
  template <class T>
  using Forward = GruAfterUnit<T>;
  template <class T>
  using Backward = GruAfterGradient<T>;
};
struct ClusterGruBefore {
  static constexpr Cell kCell = Cell::gru_before;
  template <class T>
  using Forward = GruBeforeUnit<T>;
  template <class T>
  using Backward = GruBeforeGradient<T>;
};

static_assert(kClusterRows == kClusterPlanRows);

// What the plan calls a product.
template <class Product>
constexpr ClusterProduct kClusterProductOf =
    kIs16Bit<typename Product::Element>   ? ClusterProduct::tensor_cores_16
    : std::is_same_v<Product, ClusterFma> ? ClusterProduct::multiply_adds
                                          : ClusterProduct::tensor_cores_tf32;

template <class Config, Cell kCell, Pass kPass, class Params>
Status launch_cluster(const char* doing, void (*kernel)(Params), const Params& params,
                      const CudaCall& call, const ClusterPlan& plan) {
  static_assert(Config::kSharedBytes ==
                cluster_shared_bytes(kCell, kPass, kClusterProductOf<typename Config::Product>,
                                     {Config::kDepth, Config::kCtas}));
  if constexpr (!Config::kTensorCores)
    static_assert(Config::Rows::kMostRows == cluster_fma_rows(kCell, Config::kDepth));
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(plan.ctas * plan.clusters);
  shape.threads = Config::kThreads;
  shape.shared = static_cast<std::size_t>(Config::kSharedBytes);
  shape.cluster = static_cast<unsigned>(plan.ctas);
  // A CTA on its own waits for nobody.
  if (plan.ctas == 1) return launch(doing, kernel, shape, call.stream, params);
  return launch_persistent(doing, kernel, shape, call, params);
}

template <class Units, class Product, int kHidden, int kCtas>
Status launch_cluster_build(const ClusterForwardParams<typename Product::Element>& params,
                            const CudaCall& call, const ClusterPlan& plan) {
  using Config = ClusterForwardConfig<Product, Units::template Forward, kHidden, kCtas>;
  return launch_cluster<Config, Units::kCell, Pass::forward>(
      "launching the cluster tier's forward kernel", &cluster_forward_kernel<Config>, params, call,
      plan);
}
template <class Units, class Product, int kHidden, int kCtas>
Status launch_cluster_build(const ClusterBackwardParams<typename Product::Element>& params,
                            const CudaCall& call, const ClusterPlan& plan) {
  using Config = ClusterBackwardConfig<Product, Units::template Backward, kHidden, kCtas>;
  return launch_cluster<Config, Units::kCell, Pass::backward>(
      "launching the cluster tier's backward kernel", &cluster_backward_kernel<Config>, params,
      call, plan);
}

// Tries the builds from kBuild on. Units: ClusterLstm, ClusterGruAfter or ClusterGruBefore; Params:
// ClusterForwardParams or ClusterBackwardParams of the product's element.
template <class Units, Pass kPass, class Product, int kBuild = 0, class Params>
Status launch_cluster_kernel(const Params& params, const CudaCall& call, const ClusterPlan& plan) {
  constexpr ClusterProduct kProduct = kClusterProductOf<Product>;
  if constexpr (kBuild < cluster_builds(kProduct).count) {
    constexpr ClusterBuild kThis = cluster_builds(kProduct).first[kBuild];
    if constexpr (cluster_shared_bytes(Units::kCell, kPass, kProduct, kThis) <=
                  kClusterMostShared) {
      const ClusterBuild wanted =
          cluster_build(Units::kCell, kPass, kProduct, params.hidden, plan.ctas);
      if (wanted.hidden == kThis.hidden && wanted.ctas == kThis.ctas)
        return launch_cluster_build<Units, Product, kThis.hidden, kThis.ctas>(params, call, plan);
    }
    return launch_cluster_kernel<Units, kPass, Product, kBuild + 1>(params, call, plan);
  }
  return Status::invalid_argument("there is no kernel for " + std::to_string(params.hidden) +
                                      " hidden units on " + std::to_string(plan.ctas) + " CTAs",
                                  "Take the plan that choose() makes");
}

// The kernels of a cell with a product: TensorCore16<Bf16>, TensorCore16<F16>, ClusterFma or
// StoredTf32.
template <class Units, class Product>
struct ClusterKernels {
  using T = typename Product::Element;
  static Status forward(const ClusterForwardParams<T>& params, const CudaCall& call,
                        const ClusterPlan& plan);
  static Status backward(const ClusterBackwardParams<T>& params, const CudaCall& call,
                         const ClusterPlan& plan);
};

template <class Units, class Product>
Status ClusterKernels<Units, Product>::forward(const ClusterForwardParams<T>& params,
                                               const CudaCall& call, const ClusterPlan& plan) {
  return launch_cluster_kernel<Units, Pass::forward, Product>(params, call, plan);
}
template <class Units, class Product>
Status ClusterKernels<Units, Product>::backward(const ClusterBackwardParams<T>& params,
                                                const CudaCall& call, const ClusterPlan& plan) {
  return launch_cluster_kernel<Units, Pass::backward, Product>(params, call, plan);
}

#define RNNLM_CLUSTER_KERNELS(Product)                             \
  extern template struct ClusterKernels<ClusterLstm, Product>;     \
  extern template struct ClusterKernels<ClusterGruAfter, Product>; \
  extern template struct ClusterKernels<ClusterGruBefore, Product>
RNNLM_CLUSTER_KERNELS(TensorCore16<Bf16>);
RNNLM_CLUSTER_KERNELS(TensorCore16<F16>);
RNNLM_CLUSTER_KERNELS(ClusterFma);
RNNLM_CLUSTER_KERNELS(StoredTf32);
#undef RNNLM_CLUSTER_KERNELS

}  // namespace rnnlm
