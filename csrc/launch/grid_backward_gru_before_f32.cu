// The grid tier's backward kernels: GRU with the reset before, float32.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruBeforeGridBackward, GridBackwardFma);

}  // namespace rnnlm
