// The block and cluster tiers' kernels: LSTM, bfloat16.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterLstm, TensorCore16<Bf16>>;

}  // namespace rnnlm
