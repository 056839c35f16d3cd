// The block and cluster tiers' kernels: GRU with the reset after the product,
// float16.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterGruAfter, TensorCore16<F16>>;

}  // namespace rnnlm
