// The machine behind the CUDA runtime of runtime.cc.
#ifndef CBAM_OPS_TESTING_PTX_RUNTIME_H_
#define CBAM_OPS_TESTING_PTX_RUNTIME_H_

#include <string>

#include "testing/ptx/machine.h"

namespace cbam_ops {
namespace ptx {

Machine& TheMachine();
// The first fault since the string was last cleared.
std::string& Failure();

}  // namespace ptx
}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_PTX_RUNTIME_H_
