// The grid tier's backward kernels: LSTM, float32 rounded to TF32.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(LstmGridBackward, HeldTf32);

}  // namespace rnnlm
