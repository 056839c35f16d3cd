// The grid tier's backward kernels: GRU with the reset before, float16.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruBeforeGridBackward, TensorCore16<F16>);

}  // namespace rnnlm
