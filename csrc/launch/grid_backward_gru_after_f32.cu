// The grid tier's backward kernels: GRU with the reset after, float32.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruAfterGridBackward, GridBackwardFma);

}  // namespace rnnlm
