#include "launch/stepwise.h"

namespace rnnlm {

template struct Stepwise<double>;

}  // namespace rnnlm
