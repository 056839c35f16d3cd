// The block and cluster tiers' kernels: LSTM, float32.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterLstm, ClusterFma>;

}  // namespace rnnlm
