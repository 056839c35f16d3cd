#include "launch/stepwise.h"

namespace rnnlm {

template struct Stepwise<float>;

}  // namespace rnnlm
