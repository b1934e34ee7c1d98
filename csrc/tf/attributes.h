// The attributes of an op as csrc/ops asks for them.
#ifndef CBAM_OPS_TF_ATTRIBUTES_H_
#define CBAM_OPS_TF_ATTRIBUTES_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/contract.h"
#include "ops/options.h"
#include "ops/signature.h"
#include "tensorflow/core/framework/types.pb.h"
#include "tf/status.h"

namespace cbam_ops {
namespace tf {

// Reads through `context->GetAttr(name, &value)`; the first failure is `status()`.
template <typename Context>
class Attributes {
 public:
  explicit Attributes(Context* context) : context_(context) {}

  const absl::Status& status() const { return status_; }

  std::string Word(const char* name) { return Get<std::string>(name); }
  double Number(const char* name) { return Get<float>(name); }
  int64_t Count(const char* name) { return Get<int>(name); }
  DataType Type(const char* name) {
    const auto type = Get<tensorflow::DataType>(name);
    switch (type) {
      case tensorflow::DT_FLOAT:
        return DataType::kFloat32;
      case tensorflow::DT_HALF:
        return DataType::kFloat16;
      case tensorflow::DT_BFLOAT16:
        return DataType::kBFloat16;
      case tensorflow::DT_DOUBLE:
        return DataType::kFloat64;
      default:
        status_.Update(absl::InvalidArgumentError(
            absl::StrCat("`", name, "` must be half, bfloat16, float or double, got ",
                         tensorflow::DataType_Name(type))));
        return DataType::kFloat32;
    }
  }

 private:
  template <typename T>
  T Get(const char* name) {
    T value{};
    status_.Update(context_->GetAttr(name, &value));
    return value;
  }

  Context* context_;
  absl::Status status_;
};

template <typename Args, typename Context>
absl::Status ReadAttributes(const ops::Signature<Args>& signature, Context* context,
                            ops::Options* options) {
  Attributes<Context> attributes(context);
  const std::string error = ops::ReadOptions(signature, &attributes, options);
  return attributes.status().ok() ? ToAbslStatus(signature.op, error) : attributes.status();
}

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_ATTRIBUTES_H_
