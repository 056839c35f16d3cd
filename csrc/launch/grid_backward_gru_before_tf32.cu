// The grid tier's backward kernels: GRU with the reset before, float32 rounded to TF32.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruBeforeGridBackward, HeldTf32);

}  // namespace rnnlm
