// The block and cluster tiers' kernels: GRU with the reset before the product,
// float16.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterGruBefore, TensorCore16<F16>>;

}  // namespace rnnlm
