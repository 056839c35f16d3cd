// The grid tier's backward kernels: GRU with the reset after, float32 rounded to TF32.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruAfterGridBackward, HeldTf32);

}  // namespace rnnlm
