// The grid tier's forward kernels: GRU with the reset after, float16.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(GruAfterCell, TensorCore16<F16>);

}  // namespace rnnlm
