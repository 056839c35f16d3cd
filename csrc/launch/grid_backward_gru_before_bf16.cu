// The grid tier's backward kernels: GRU with the reset before, bfloat16.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruBeforeGridBackward, TensorCore16<Bf16>);

}  // namespace rnnlm
