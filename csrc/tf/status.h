// The core's status, and the texts of csrc/ops, as TensorFlow's and XLA's status.
#ifndef CBAM_OPS_TF_STATUS_H_
#define CBAM_OPS_TF_STATUS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/contract.h"

namespace cbam_ops {
namespace tf {

// A text about arguments; empty where nothing is wrong.
inline absl::Status ToAbslStatus(const char* op, const std::string& error) {
  return error.empty() ? absl::OkStatus()
                       : absl::InvalidArgumentError(absl::StrCat(op, ": ", error));
}

inline absl::Status ToAbslStatus(const char* op, const Status& status) {
  const auto text = absl::StrCat(op, ": ", *status.kernel != '\0' ? status.kernel : "",
                                 *status.kernel != '\0' ? ": " : "", status.message);
  switch (status.code) {
    case StatusCode::kOk:
      return absl::OkStatus();
    case StatusCode::kInvalidProblem:
      return absl::InvalidArgumentError(text);
    case StatusCode::kUnsupported:
      return absl::UnimplementedError(text);
    case StatusCode::kDeviceError:
      break;
  }
  return absl::InternalError(text);
}

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_STATUS_H_
