// The block and cluster tiers' kernels: LSTM, float32 rounded to TF32.
#include "launch/cluster.h"

namespace rnnlm {

template struct ClusterKernels<ClusterLstm, StoredTf32>;

}  // namespace rnnlm
