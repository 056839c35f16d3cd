// The grid tier's backward kernels: LSTM, bfloat16.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(LstmGridBackward, TensorCore16<Bf16>);

}  // namespace rnnlm
