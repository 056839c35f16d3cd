// The block and cluster tiers' kernels: LSTM, float16.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterLstm, TensorCore16<F16>>;

}  // namespace rnnlm
