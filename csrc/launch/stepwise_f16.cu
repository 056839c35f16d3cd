#include "launch/stepwise.h"

namespace rnnlm {

template struct Stepwise<F16>;

}  // namespace rnnlm
