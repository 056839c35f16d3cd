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
  using Forward = LstmUnit;
  using Backward = LstmGradient;
};
struct ClusterGruAfter {
  static constexpr Cell kCell = Cell::gru_after;
  using Forward = GruAfterUnit;
  using Backward = GruAfterGradient;
};
struct ClusterGruBefore {
  static constexpr Cell kCell = Cell::gru_before;
  using Forward = GruBeforeUnit;
  using Backward = GruBeforeGradient;
};

template <class Config, Cell kCell, Pass kPass, class Params>
Status launch_cluster(const char* doing, void (*kernel)(Params), const Params& params,
                      const CudaCall& call, const ClusterPlan& plan) {
  static_assert(Config::kSharedBytes ==
                cluster_shared_bytes(kCell, kPass, {Config::kDepth, Config::kCtas}));
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(plan.ctas * plan.clusters);
  shape.threads = Config::kThreads;
  shape.shared = static_cast<std::size_t>(Config::kSharedBytes);
  shape.cluster = static_cast<unsigned>(plan.ctas);
  // A CTA on its own waits for nobody.
  if (plan.ctas == 1) return launch(doing, kernel, shape, call.stream, params);
  return launch_persistent(doing, kernel, shape, call, params);
}

template <class Units, class T, int kBuild>
Status launch_cluster_build(const ClusterForwardParams<T>& params, const CudaCall& call,
                            const ClusterPlan& plan) {
  using Config = ClusterForwardConfig<T, typename Units::Forward, kClusterBuilds[kBuild].hidden,
                                      kClusterBuilds[kBuild].ctas>;
  return launch_cluster<Config, Units::kCell, Pass::forward>(
      "launching the cluster tier's forward kernel", &cluster_forward_kernel<Config>, params, call,
      plan);
}
template <class Units, class T, int kBuild>
Status launch_cluster_build(const ClusterBackwardParams<T>& params, const CudaCall& call,
                            const ClusterPlan& plan) {
  using Config = ClusterBackwardConfig<T, typename Units::Backward, kClusterBuilds[kBuild].hidden,
                                       kClusterBuilds[kBuild].ctas>;
  return launch_cluster<Config, Units::kCell, Pass::backward>(
      "launching the cluster tier's backward kernel", &cluster_backward_kernel<Config>, params,
      call, plan);
}

// Tries the builds from kBuild on. Units: ClusterLstm, ClusterGruAfter or ClusterGruBefore; Params:
// ClusterForwardParams or ClusterBackwardParams of T.
template <class Units, class T, int kBuild = 0, class Params>
Status launch_cluster_kernel(const Params& params, const CudaCall& call, const ClusterPlan& plan) {
  if constexpr (kBuild < int(sizeof(kClusterBuilds) / sizeof(kClusterBuilds[0]))) {
    constexpr ClusterBuild kThis = kClusterBuilds[kBuild];
    const ClusterBuild wanted = cluster_build(params.hidden, plan.ctas);
    if (wanted.hidden == kThis.hidden && wanted.ctas == kThis.ctas)
      return launch_cluster_build<Units, T, kBuild>(params, call, plan);
    return launch_cluster_kernel<Units, T, kBuild + 1>(params, call, plan);
  }
  return Status::invalid_argument("there is no kernel for " + std::to_string(params.hidden) +
                                      " hidden units on " + std::to_string(plan.ctas) + " CTAs",
                                  "Take the plan that choose() makes");
}

// The kernels of a cell for tensors of T.
template <class Units, class T>
struct ClusterKernels {
  static Status forward(const ClusterForwardParams<T>& params, const CudaCall& call,
                        const ClusterPlan& plan);
  static Status backward(const ClusterBackwardParams<T>& params, const CudaCall& call,
                         const ClusterPlan& plan);
};

template <class Units, class T>
Status ClusterKernels<Units, T>::forward(const ClusterForwardParams<T>& params,
                                         const CudaCall& call, const ClusterPlan& plan) {
  return launch_cluster_kernel<Units, T>(params, call, plan);
}
template <class Units, class T>
Status ClusterKernels<Units, T>::backward(const ClusterBackwardParams<T>& params,
                                          const CudaCall& call, const ClusterPlan& plan) {
  return launch_cluster_kernel<Units, T>(params, call, plan);
}

extern template struct ClusterKernels<ClusterLstm, Bf16>;
extern template struct ClusterKernels<ClusterLstm, F16>;
extern template struct ClusterKernels<ClusterGruAfter, Bf16>;
extern template struct ClusterKernels<ClusterGruAfter, F16>;
extern template struct ClusterKernels<ClusterGruBefore, Bf16>;
extern template struct ClusterKernels<ClusterGruBefore, F16>;

}  // namespace rnnlm
