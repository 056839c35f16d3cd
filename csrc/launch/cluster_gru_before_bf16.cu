// The block and cluster tiers' kernels: GRU with the reset before the product,
// bfloat16.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterGruBefore, TensorCore16<Bf16>>;

}  // namespace rnnlm
