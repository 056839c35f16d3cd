// The block and cluster tiers' kernels: GRU with the reset after the product,
// float32.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterGruAfter, ClusterFma>;

}  // namespace rnnlm
