// The grid tier's forward kernels: LSTM, bfloat16.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(LstmCell, TensorCore16<Bf16>);

}  // namespace rnnlm
