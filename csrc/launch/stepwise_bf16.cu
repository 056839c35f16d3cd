#include "launch/stepwise.h"

namespace rnnlm {

template struct Stepwise<Bf16>;

}  // namespace rnnlm
