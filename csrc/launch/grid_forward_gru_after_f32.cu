// The grid tier's forward kernels: GRU with the reset after, float32.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(GruAfterCell, GridFma);

}  // namespace rnnlm
