// The block and cluster tiers' kernels: GRU with the reset after the product,
// bfloat16.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterGruAfter, TensorCore16<Bf16>>;

}  // namespace rnnlm
