// The grid tier's forward kernels: GRU with the reset before, float32.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(GruBeforeCell, GridFma);

}  // namespace rnnlm
