// The grid tier's forward kernels: GRU with the reset after, float32 rounded to TF32.
#include "launch/grid_forward.h"

namespace rnnlm {

RNNLM_GRID_FORWARD(GruAfterCell, HeldTf32);

}  // namespace rnnlm
