// The grid tier's forward kernels whose CTAs gather in pairs: LSTM, float16.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD_PAIRS(LstmCell, TensorCore16<F16>);

}  // namespace rnnlm
