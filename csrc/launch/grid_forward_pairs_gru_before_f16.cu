// The grid tier's forward kernels whose CTAs gather in pairs: GRU with the reset before, float16.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD_PAIRS(GruBeforeCell, TensorCore16<F16>);

}  // namespace rnnlm
