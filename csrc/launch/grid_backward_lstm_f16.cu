// The grid tier's backward kernels: LSTM, float16.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(LstmGridBackward, TensorCore16<F16>);

}  // namespace rnnlm
