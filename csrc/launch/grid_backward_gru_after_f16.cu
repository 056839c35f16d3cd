// The grid tier's backward kernels: GRU with the reset after, float16.
#include "launch/grid_backward.h"

namespace rnnlm {

RNNLM_GRID_BACKWARD(GruAfterGridBackward, TensorCore16<F16>);

}  // namespace rnnlm
