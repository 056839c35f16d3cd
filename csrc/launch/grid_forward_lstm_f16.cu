// The grid tier's forward kernels: LSTM, float16.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(LstmCell, TensorCore16<F16>);

}  // namespace rnnlm
