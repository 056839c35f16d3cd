// The block and cluster tiers' kernels: GRU with the reset before the product,
// float32.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterGruBefore, ClusterFma>;

}  // namespace rnnlm
