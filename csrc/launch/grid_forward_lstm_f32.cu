// The grid tier's forward kernels: LSTM, float32.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(LstmCell, GridFma);

}  // namespace rnnlm
