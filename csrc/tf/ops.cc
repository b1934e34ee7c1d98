// Definitions of the ops and their shape functions, made from the table in ops/signature.h.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "ops/dimensions.h"
#include "ops/options.h"
#include "ops/signature.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/attributes.h"
#include "tf/status.h"

namespace cbam_ops {
namespace tf {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

template <typename Args>
absl::Status InferShapes(const ops::Signature<Args>& signature, InferenceContext* context) {
  ops::Options options;
  TF_RETURN_IF_ERROR(ReadAttributes(signature, context, &options));

  ops::Dimensions dimensions(options.problem);
  for (const auto& input : signature.inputs) {
    if (!ops::IsPresent(input.argument, options)) continue;
    std::vector<ShapeHandle> handles;
    TF_RETURN_IF_ERROR(context->input(input.argument.name, &handles));
    for (const ShapeHandle handle : handles) {
      if (!context->RankKnown(handle)) continue;
      std::vector<int64_t> sizes;
      for (int i = 0; i < context->Rank(handle); ++i) {
        const DimensionHandle size = context->Dim(handle, i);
        sizes.push_back(context->ValueKnown(size) ? context->Value(size) : ops::kUnknown);
      }
      TF_RETURN_IF_ERROR(ToAbslStatus(
          signature.op,
          dimensions.Learn(input.argument, sizes.data(), static_cast<int>(sizes.size()))));
    }
  }
  for (const auto& output : signature.outputs) {
    if (!ops::IsPresent(output.argument, options)) continue;
    std::vector<DimensionHandle> sizes;
    for (const int64_t size : dimensions.ShapeOf(output.argument)) {
      sizes.push_back(size == ops::kUnknown ? context->UnknownDim() : context->MakeDim(size));
    }
    TF_RETURN_IF_ERROR(context->set_output(output.argument.name, {context->MakeShape(sizes)}));
  }
  return absl::OkStatus();
}

// "w0: U" or "gamma: num_gamma * U".
std::string ArgumentDefinition(const ops::Argument& argument) {
  const char* const type = argument.type == ops::ArgumentType::kMapType ? "T" : "U";
  const char* const count = ops::CountAttribute(argument.presence);
  return count == nullptr ? absl::StrCat(argument.name, ": ", type)
                          : absl::StrCat(argument.name, ": ", count, " * ", type);
}

template <typename Args>
tensorflow::register_op::OpDefBuilderWrapper Define(const ops::Signature<Args>& signature) {
  tensorflow::register_op::OpDefBuilderWrapper op(signature.op);
  for (const auto& input : signature.inputs) {
    if (ops::Has(signature.module, input.argument.gate))
      op.Input(ArgumentDefinition(input.argument));
  }
  for (const auto& output : signature.outputs) {
    if (ops::Has(signature.module, output.argument.gate))
      op.Output(ArgumentDefinition(output.argument));
  }
  std::vector<std::string> counts;
  ops::ForEachArgument(signature, [&](const ops::Argument& argument) {
    const char* const count = ops::CountAttribute(argument.presence);
    if (count == nullptr || std::find(counts.begin(), counts.end(), count) != counts.end()) return;
    counts.push_back(count);
    op.Attr(absl::StrCat(count, ": int >= 0 = 0"));
  });
  op.Attr("T: {half, bfloat16, float, double}");
  if (ops::UsesComputeType(signature)) op.Attr("U: {float, double}");
  for (const ops::Choice& choice : ops::kChoices) {
    if (!choice.is_of(signature.module)) continue;
    op.Attr(absl::StrCat(choice.name, ": {'", absl::StrJoin(choice.words, "', '"), "'} = '",
                         *choice.words.begin(), "'"));
  }
  if (HasSpatialGate(signature.module))
    op.Attr(absl::StrCat(ops::kEpsilon, ": float = ", ops::kEpsilonOfSavedGraphs));
  op.SetShapeFn(
      [&signature](InferenceContext* context) { return InferShapes(signature, context); });
  op.Doc(signature.doc);
  return op;
}

template <const auto&... kSignatures>
bool DefineAll(ops::OpList<kSignatures...>) {
  ((tensorflow::InitOnStartupMarker{} << Define(kSignatures)), ...);
  return true;
}

[[maybe_unused]] const bool defined = DefineAll(ops::AllOps());

}  // namespace
}  // namespace tf
}  // namespace cbam_ops
