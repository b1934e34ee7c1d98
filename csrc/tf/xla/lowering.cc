// The ops inside XLA: each becomes one custom call, whatever its types and options.
//
// They are registered as kernels of XLA's compilation devices, one registration per op, and not
// with REGISTER_XLA_OP: that one takes no ops once the process has compiled anything, and ends the
// process when a second copy of the library is loaded.

// Of these two xla_op_kernel.h needs but pointers, and they bring half of XLA: to leave them out
// halves the time that this file takes to compile.
#define TENSORFLOW_COMPILER_TF2XLA_XLA_COMPILER_H_
#define XLA_CLIENT_CLIENT_H_
namespace xla {
class Client;
}

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "ops/dimensions.h"
#include "ops/options.h"
#include "ops/signature.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/attributes.h"
#include "tf/kernel_registration.h"
#include "tf/status.h"
#include "tf/xla/custom_call.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape.h"
#include "xla/shape_util.h"

#if defined(CBAM_HAVE_CUDA)
#include "core/cuda/kernels.h"
#endif

namespace cbam_ops {
namespace tf {
namespace {

// Writes down, as an MLIR dictionary, every attribute that ReadAttributes reads of an op.
class AttributeRecorder {
 public:
  explicit AttributeRecorder(tensorflow::OpKernelConstruction* context) : context_(context) {}

  template <typename T>
  absl::Status GetAttr(const char* name, T* value) {
    const absl::Status status = context_->GetAttr(name, value);
    if (status.ok()) attributes_[name] = Text(*value);
    return status;
  }

  std::string text() const { return absl::StrJoin(attributes_, ", ", absl::PairFormatter(" = ")); }

 private:
  static std::string Text(tensorflow::DataType value) { return Text(static_cast<int>(value)); }
  static std::string Text(int value) { return absl::StrCat(value, " : i32"); }
  static std::string Text(const std::string& value) { return absl::StrCat("\"", value, "\""); }
  static std::string Text(float value) {
    uint32_t bits;
    static_assert(sizeof(bits) == sizeof(value));
    std::memcpy(&bits, &value, sizeof(bits));
    return absl::StrFormat("0x%08X : f32", bits);  // decimal digits could round
  }

  tensorflow::OpKernelConstruction* context_;
  std::map<std::string, std::string> attributes_;  // some are read twice
};

struct Host {
  static constexpr char kDevice[] = "XLA_CPU_JIT";
  static bool RegisterHandlers() { return RegisterHostHandlers(); }

  // Adds what the handler must know besides the op's attributes; returns the bytes of scratch.
  template <typename Args>
  static size_t Plan(tensorflow::OpKernelContext* context, const Problem& problem,
                     std::string* attributes) {
    // The compiling device has the process's intra-op pool, on which the handler will run.
    const int threads = context->device()->tensorflow_cpu_worker_threads()->num_threads;
    absl::StrAppend(attributes, ", ", kThreads, " = ", threads, " : i32");
    cpu::Parallel parallel;
    parallel.threads = threads;
    return cpu::WorkspaceBytes<Args>(problem, parallel) + kHostAlignment - 1;
  }
};

#if defined(CBAM_HAVE_CUDA)
struct Cuda {
  static constexpr char kDevice[] = "XLA_GPU_JIT";
  static bool RegisterHandlers() { return RegisterCudaHandlers(); }

  template <typename Args>
  static size_t Plan(tensorflow::OpKernelContext*, const Problem& problem, std::string*) {
    return cuda::WorkspaceBytes<Args>(problem) + kCudaAlignment - 1;
  }
};
#endif

// The axis of the samples, -1 without one.
int BatchAxis(const ops::Argument& argument) {
  const auto* const begin = argument.dims.dims;
  const auto* const end = begin + argument.dims.rank;
  const auto* const found = std::find(begin, end, ops::Dim::kBatch);
  return found == end ? -1 : static_cast<int>(found - begin);  // first in both layouts of a map
}

// A batch whose size XLA does not know but bounds (from tf.boolean_mask, say). A custom call has
// fixed shapes, so it gets the bound's batch with zeros for the samples that are not there: they
// add nothing to the gradients of the weights, and their own results are cut off.
class DynamicBatch {
 public:
  explicit DynamicBatch(xla::XlaBuilder* builder) : builder_(builder) {}

  xla::XlaOp Pad(xla::XlaOp operand, const xla::Shape& shape, int axis) {
    if (axis < 0 || !shape.is_dynamic_dimension(axis)) return operand;
    const xla::XlaOp size = xla::GetDimensionSize(operand, axis);
    if (!size_.valid()) size_ = size;
    const xla::Shape fixed = xla::ShapeUtil::MakeShape(shape.element_type(), shape.dimensions());
    const xla::XlaOp sample =
        xla::Iota(builder_, xla::ShapeUtil::MakeShape(xla::S32, shape.dimensions()), axis);
    return xla::Select(xla::Lt(sample, size), xla::RemoveDynamicDimension(operand, axis),
                       xla::Zeros(builder_, fixed));
  }
  xla::XlaOp Unpad(xla::XlaOp result, int axis) const {
    return axis < 0 || !size_.valid() ? result : xla::SetDimensionSize(result, size_, axis);
  }

 private:
  xla::XlaBuilder* builder_;
  xla::XlaOp size_;
};

template <const auto& kSignature, typename Platform>
class CustomCallOp final : public tensorflow::XlaOpKernel {
 public:
  explicit CustomCallOp(tensorflow::OpKernelConstruction* context) : XlaOpKernel(context) {
    AttributeRecorder recorder(context);
    OP_REQUIRES_OK(context, ReadAttributes(kSignature, &recorder, &options_));
    attributes_ = recorder.text();
  }

  void Compile(tensorflow::XlaOpKernelContext* context) override {
    OP_REQUIRES_OK(context, Lower(context));
  }

 private:
  using Args = typename std::decay_t<decltype(kSignature)>::Args;

  absl::Status Lower(tensorflow::XlaOpKernelContext* context) const {
    ops::Dimensions dimensions(options_.problem);
    DynamicBatch batch(context->builder());
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes;
    for (const auto& input : kSignature.inputs) {
      if (!ops::IsPresent(input.argument, options_)) continue;
      int begin = 0, end = 0;
      TF_RETURN_IF_ERROR(InputRange(input.argument.name, &begin, &end));
      for (int i = begin; i < end; ++i) {
        TF_ASSIGN_OR_RETURN(const xla::Shape shape, context->InputXlaShape(i));
        const auto sizes = shape.dimensions();
        TF_RETURN_IF_ERROR(ToAbslStatus(
            kSignature.op,
            dimensions.Learn(input.argument, sizes.data(), static_cast<int>(sizes.size()))));
        const int axis = BatchAxis(input.argument);
        for (int d = 0; d < static_cast<int>(sizes.size()); ++d) {
          if (shape.is_dynamic_dimension(d) && (d != axis || options_.problem.batch_norm)) {
            return absl::InvalidArgumentError(
                absl::StrCat(kSignature.op, ": `", input.argument.name, "` must have ",
                             options_.problem.batch_norm ? "sizes" : "sizes, but for N,",
                             " that are known when XLA compiles, got shape ",
                             xla::ShapeUtil::HumanString(shape)));
          }
        }
        operands.push_back(batch.Pad(context->Input(i), shape, axis));
        operand_shapes.push_back(xla::ShapeUtil::MakeShape(shape.element_type(), sizes));
      }
    }
    std::vector<int> outputs;
    std::vector<int> batch_axes;
    std::vector<xla::Shape> result_shapes;
    for (const auto& output : kSignature.outputs) {
      if (!ops::IsPresent(output.argument, options_)) continue;
      int begin = 0, end = 0;
      TF_RETURN_IF_ERROR(OutputRange(output.argument.name, &begin, &end));
      for (int i = begin; i < end; ++i) {
        outputs.push_back(i);
        batch_axes.push_back(BatchAxis(output.argument));
        result_shapes.push_back(xla::ShapeUtil::MakeShape(context->output_xla_type(i),
                                                          dimensions.ShapeOf(output.argument)));
      }
    }
    std::string attributes = attributes_;
    const size_t scratch = Platform::template Plan<Args>(context->op_kernel_context(),
                                                         dimensions.ToProblem(), &attributes);
    result_shapes.push_back(xla::ShapeUtil::MakeShape(xla::U8, {static_cast<int64_t>(scratch)}));
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), kSignature.op, operands, xla::ShapeUtil::MakeTupleShape(result_shapes),
        operand_shapes, absl::StrCat("{", attributes, "}"), /*has_side_effect=*/false,
        /*output_operand_aliasing=*/{}, /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t i = 0; i < outputs.size(); ++i) {
      context->SetOutput(outputs[i], batch.Unpad(xla::GetTupleElement(call, i), batch_axes[i]));
    }
    return absl::OkStatus();
  }

  ops::Options options_;
  std::string attributes_;
};

template <typename Platform, const auto& kFirst, const auto&... kSignatures>
bool Register(ops::OpList<kFirst, kSignatures...>) {
  // Where another copy of this library came first, a second kernel would make all of them
  // ambiguous. REGISTER_KERNEL_BUILDER does not look.
  const auto registered = tensorflow::GetRegisteredKernelsForOp(kFirst.op);
  for (const auto& kernel : registered.kernel()) {
    if (kernel.device_type() == Platform::kDevice) return false;
  }
  // A kernel without its handler would fail when it is too late to do something else.
  if (!Platform::RegisterHandlers()) return false;
  RegisterKernel<CustomCallOp<kFirst, Platform>>(kFirst.op, Platform::kDevice);
  (RegisterKernel<CustomCallOp<kSignatures, Platform>>(kSignatures.op, Platform::kDevice), ...);
  return true;
}

[[maybe_unused]] const bool registered_host = Register<Host>(ops::AllOps());
#if defined(CBAM_HAVE_CUDA)
[[maybe_unused]] const bool registered_cuda = Register<Cuda>(ops::AllOps());
#endif

}  // namespace
}  // namespace tf
}  // namespace cbam_ops
