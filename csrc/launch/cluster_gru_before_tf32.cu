// The block and cluster tiers' kernels: GRU with the reset before the product,
// float32 rounded to TF32.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterGruBefore, StoredTf32>;

}  // namespace rnnlm
