// The core's status of a GPU call as TensorFlow's and XLA's.
#ifndef CBAM_OPS_TF_GPU_STATUS_H_
#define CBAM_OPS_TF_GPU_STATUS_H_

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/contract.h"
#include "core/cuda/kernels.h"
#include "tf/status.h"

namespace cbam_ops {
namespace tf {
namespace gpu {

// As for CPUs; where the current device cannot run this build, with the versions or architectures
// that do not fit, which the core's own words cannot hold.
inline absl::Status ToAbslStatus(const char* op, const Status& status) {
  if (status.code == StatusCode::kUnsupported) {
    char reason[cuda::kWhyNotBytes];
    cuda::WhyNot(/*capability=*/0, reason, sizeof(reason));
    if (*reason != '\0') return absl::UnimplementedError(absl::StrCat(op, ": ", reason));
  }
  return tf::ToAbslStatus(op, status);
}

}  // namespace gpu
}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_GPU_STATUS_H_
