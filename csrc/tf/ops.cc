// Definitions of the ops and their shape functions, made from the tables in signature.h.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/checks.h"
#include "tf/signature.h"

namespace cbam_ops {
namespace tf {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

template <typename SignatureT>
absl::Status InferShapes(const SignatureT& signature, InferenceContext* context) {
  Problem options;
  absl::Status status = ReadOptions(signature, context, &options);
  if (!status.ok()) return status;

  Dimensions dimensions(signature.op, options);
  for (const auto& input : signature.inputs) {
    if (!Has(signature.kind, input.argument.part)) continue;
    std::vector<ShapeHandle> handles;
    status = context->input(input.argument.name, &handles);
    if (!status.ok()) return status;
    for (const ShapeHandle handle : handles) {
      if (!context->RankKnown(handle)) continue;
      std::vector<int64_t> sizes;
      for (int i = 0; i < context->Rank(handle); ++i) {
        const DimensionHandle size = context->Dim(handle, i);
        sizes.push_back(context->ValueKnown(size) ? context->Value(size) : kUnknown);
      }
      status = dimensions.Learn(input.argument, sizes.data(), static_cast<int>(sizes.size()));
      if (!status.ok()) return status;
    }
  }
  for (const auto& output : signature.outputs) {
    if (!Has(signature.kind, output.argument.part)) continue;
    std::vector<DimensionHandle> sizes;
    for (const int64_t size : dimensions.Shape(output.argument)) {
      sizes.push_back(size == kUnknown ? context->UnknownDim() : context->MakeDim(size));
    }
    int count = 1;
    if (*output.argument.count != '\0') {
      status = context->GetAttr(output.argument.count, &count);
      if (!status.ok()) return status;
    }
    status = context->set_output(output.argument.name,
                                 std::vector<ShapeHandle>(count, context->MakeShape(sizes)));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

// "w0: U" or "gamma: num_gamma * U".
std::string ArgumentDefinition(const Argument& argument) {
  return absl::StrCat(argument.name, ": ", argument.count, *argument.count != '\0' ? " * " : "",
                      argument.type == ArgumentType::kMapType ? "T" : "U");
}

template <typename SignatureT>
tensorflow::register_op::OpDefBuilderWrapper Define(const SignatureT& signature, const char* doc) {
  tensorflow::register_op::OpDefBuilderWrapper op(signature.op);
  std::vector<std::string> counts;
  const auto add_count = [&](const Argument& argument) {
    if (*argument.count == '\0') return;
    for (const std::string& known : counts) {
      if (known == argument.count) return;
    }
    counts.push_back(argument.count);
    op.Attr(absl::StrCat(argument.count, ": int >= 0 = 0"));
  };
  for (const auto& input : signature.inputs) {
    if (!Has(signature.kind, input.argument.part)) continue;
    op.Input(ArgumentDefinition(input.argument));
    add_count(input.argument);
  }
  for (const auto& output : signature.outputs) {
    if (!Has(signature.kind, output.argument.part)) continue;
    op.Output(ArgumentDefinition(output.argument));
    add_count(output.argument);
  }
  op.Attr("T: {half, bfloat16, float, double}");
  if (signature.kind != Kind::kPool) op.Attr("U: {float, double}");
  for (const std::string& definition : AttributeDefinitions(signature.kind)) op.Attr(definition);
  op.SetShapeFn(
      [&signature](InferenceContext* context) { return InferShapes(signature, context); });
  op.Doc(doc);
  return op;
}

#define CBAM_OPS_REGISTER(signature, doc)                                              \
  static const tensorflow::InitOnStartupMarker register_##signature [[maybe_unused]] = \
      tensorflow::InitOnStartupMarker{} << Define(signature, doc)

CBAM_OPS_REGISTER(kCbam, R"(
The convolutional block attention module (Woo et al., 2018) in one pass over memory.

u = x * channel_gate(x); y = activation(u * spatial_gate(u) + residual), or with order='parallel'
y = activation(x * channel_gate(x) * spatial_gate(x) + residual). With `gamma` the convolution of the
spatial gate is normalised by its own mean and variance over the batch and all positions, and `bias`
is the offset (the training form of batch norm). The outputs after `spatial_gate` are what the
gradient needs.)");
CBAM_OPS_REGISTER(kCbamGrad, "The gradient of CbamOps>Cbam.");
CBAM_OPS_REGISTER(kChannelAttention, "y = activation(x * channel_gate(x) + residual).");
CBAM_OPS_REGISTER(kChannelAttentionGrad, "The gradient of CbamOps>ChannelAttention.");
CBAM_OPS_REGISTER(kSpatialAttention,
                  "y = activation(x * spatial_gate(x) + residual); `gamma` as in CbamOps>Cbam.");
CBAM_OPS_REGISTER(kSpatialAttentionGrad, "The gradient of CbamOps>SpatialAttention.");
CBAM_OPS_REGISTER(kChannelPool, "Mean and maximum over positions, in one read of x.");
CBAM_OPS_REGISTER(kChannelPoolGrad, "The gradient of CbamOps>ChannelPool; equal maxima share.");
CBAM_OPS_REGISTER(kSpatialPool, "Mean and maximum over channels, in one read of x; mean first.");
CBAM_OPS_REGISTER(kSpatialPoolGrad, "The gradient of CbamOps>SpatialPool; equal maxima share.");

#undef CBAM_OPS_REGISTER

}  // namespace
}  // namespace tf
}  // namespace cbam_ops
