// The grid tier's forward kernels: LSTM, float32 rounded to TF32.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(LstmCell, HeldTf32);

}  // namespace rnnlm
