// The grid tier's backward kernels: GRU with the reset after, bfloat16.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruAfterGridBackward, TensorCore16<Bf16>);

}  // namespace rnnlm
