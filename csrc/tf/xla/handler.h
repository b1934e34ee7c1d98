// What the handlers of all platforms share: a custom call is taken apart and checked by the table
// in ops/signature.h, as kernels do with an op's tensors. Nothing about it is taken on trust, since
// it may come from a file.
#ifndef CBAM_OPS_TF_XLA_HANDLER_H_
#define CBAM_OPS_TF_XLA_HANDLER_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/contract.h"
#include "ops/dimensions.h"
#include "ops/options.h"
#include "ops/signature.h"
#include "tensorflow/core/framework/types.pb.h"
#include "tf/attributes.h"
#include "tf/status.h"
#include "tf/tf_compat.h"
#include "xla/ffi/api/ffi.h"

namespace cbam_ops {
namespace tf {

namespace ffi = ::xla::ffi;

// The attributes of a call, in the way that ReadAttributes asks for them.
class AttributeReader {
 public:
  AttributeReader(const char* op, const ffi::Dictionary& attributes)
      : op_(op), attributes_(attributes) {}

  absl::Status GetAttr(const char* name, tensorflow::DataType* value) {
    int number = 0;
    const absl::Status status = GetAttr(name, &number);
    *value = static_cast<tensorflow::DataType>(number);
    return status;
  }
  absl::Status GetAttr(const char* name, std::string* value) {
    std::string_view view;
    const absl::Status status = Get(name, &view);
    *value = std::string(view);
    return status;
  }
  absl::Status GetAttr(const char* name, int* value) { return Get<int32_t>(name, value); }
  absl::Status GetAttr(const char* name, float* value) { return Get(name, value); }

  // An attribute that nobody asked for may be an option that this version does not know. Its name
  // cannot be told: the dictionary of TensorFlow 2.20 does not list them.
  absl::Status CheckAllRead() const {
    if (read_.size() == attributes_.size()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(op_, ": the custom call has ", attributes_.size(),
                     " attributes, of which only `", absl::StrJoin(read_, "`, `"), "` are known"));
  }

 private:
  template <typename T>
  absl::Status Get(const char* name, T* value) {
    const auto found = attributes_.get<T>(name);
    if (!found.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat(op_, ": the custom call's attribute `", name,
                       "` is missing or of another type: ", found.error().message()));
    }
    *value = *found;
    if (std::find(read_.begin(), read_.end(), name) == read_.end()) read_.push_back(name);
    return absl::OkStatus();
  }

  const char* op_;
  const ffi::Dictionary& attributes_;
  absl::InlinedVector<std::string_view, 16> read_;
};

inline ffi::DataType ToFfi(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return ffi::DataType::F32;
    case DataType::kFloat16:
      return ffi::DataType::F16;
    case DataType::kBFloat16:
      return ffi::DataType::BF16;
    case DataType::kFloat64:
      return ffi::DataType::F64;
  }
  return ffi::DataType::INVALID;
}

// A call in the core's terms.
template <const auto& kSignature>
struct CustomCall {
  using Args = typename std::decay_t<decltype(kSignature)>::Args;

  Problem problem;
  Args args;
  void* scratch = nullptr;
  size_t scratch_bytes = 0;

  absl::Status Unpack(const ffi::RemainingArgs& operands, const ffi::RemainingRets& results,
                      AttributeReader* attributes) {
    ops::Options options;
    absl::Status status = ReadAttributes(kSignature, attributes, &options);
    if (!status.ok()) return status;
    ops::Dimensions dimensions(options.problem);

    size_t position = 0;
    for (const auto& input : kSignature.inputs) {
      if (!ops::IsPresent(input.argument, options)) continue;
      const auto operand = operands.get<ffi::AnyBuffer>(position++);
      if (!operand.has_value()) return Missing(input.argument, "operand", operands.size());
      status = Check(input.argument, *operand, options.problem.dtype, &dimensions);
      if (!status.ok()) return status;
      if (input.pointer != nullptr) args.*input.pointer = operand->untyped_data();
    }
    if (position != operands.size()) return TooMany("operands", position, operands.size());

    position = 0;
    for (const auto& output : kSignature.outputs) {
      if (!ops::IsPresent(output.argument, options)) continue;
      auto result = results.get<ffi::AnyBuffer>(position++);
      if (!result.has_value()) return Missing(output.argument, "result", results.size());
      const ffi::AnyBuffer& buffer = **result;
      status = Check(output.argument, buffer, options.problem.dtype, &dimensions);
      if (!status.ok()) return status;
      args.*output.pointer = buffer.untyped_data();
    }
    auto last = results.get<ffi::AnyBuffer>(position++);
    if (!last.has_value() || (*last)->element_type() != ffi::DataType::U8) {
      return Invalid("the custom call's last result must be scratch memory of type uint8");
    }
    if (position != results.size()) return TooMany("results", position, results.size());
    scratch = (*last)->untyped_data();
    scratch_bytes = (*last)->size_bytes();
    problem = dimensions.ToProblem();
    return absl::OkStatus();
  }

  // The first `bytes` of the scratch memory from the next multiple of `alignment` on.
  absl::Status Workspace(size_t bytes, size_t alignment, void** workspace) const {
    if (bytes == 0) return absl::OkStatus();
    const size_t offset = -reinterpret_cast<uintptr_t>(scratch) % alignment;
    if (offset + bytes > scratch_bytes) {
      return Invalid("the kernel needs ", bytes, " bytes of scratch memory aligned to ", alignment,
                     ", but the custom call was compiled with ", scratch_bytes,
                     "; was it compiled for another machine?");
    }
    *workspace = static_cast<char*>(scratch) + offset;
    return absl::OkStatus();
  }

 private:
  template <typename... Words>
  static absl::Status Invalid(const Words&... words) {
    return absl::InvalidArgumentError(absl::StrCat(kSignature.op, ": ", words...));
  }
  static absl::Status Missing(const ops::Argument& argument, const char* what, size_t received) {
    return Invalid("the custom call has no ", what, " for `", argument.name, "`: there are ",
                   received);
  }
  static absl::Status TooMany(const char* what, size_t expected, size_t received) {
    return Invalid("the custom call must have ", expected, " ", what, ", got ", received);
  }

  static absl::Status Check(const ops::Argument& argument, const ffi::AnyBuffer& buffer,
                            DataType map_type, ops::Dimensions* dimensions) {
    const ffi::DataType expected = ToFfi(ops::TypeOf(argument, map_type));
    if (buffer.element_type() != expected) {
      return Invalid("`", argument.name, "` must have XLA's type number ",
                     static_cast<int>(expected), ", got ", static_cast<int>(buffer.element_type()));
    }
    const auto sizes = buffer.dimensions();
    return ToAbslStatus(kSignature.op,
                        dimensions->Learn(argument, sizes.begin(), static_cast<int>(sizes.size())));
  }
};

inline ffi::Error ToFfiError(const absl::Status& status) {
  if (status.ok()) return ffi::Error::Success();
  // XLA's codes are Abseil's.
  return ffi::Error(static_cast<XLA_FFI_Error_Code>(status.code()), std::string(status.message()));
}

// Registers a handler of one op; false where XLA refuses it.
inline bool RegisterHandler(const char* op, const char* platform, XLA_FFI_Handler_Bundle handler) {
  const XLA_FFI_Api* api = ffi::GetXlaFfiApi();
  XLA_FFI_Error* error = ffi::Ffi::RegisterStaticHandler(api, op, platform, handler);
  if (error == nullptr) return true;
  XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&destroy);
  return false;
}

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_XLA_HANDLER_H_
