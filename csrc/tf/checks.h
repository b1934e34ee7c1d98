// Attributes and shapes of the ops, checked in one place for shape functions, for kernels on any
// device and for lowerings.
#ifndef CBAM_OPS_TF_CHECKS_H_
#define CBAM_OPS_TF_CHECKS_H_

#include <array>
#include <cstdint>
#include <string>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "core/contract.h"
#include "tensorflow/core/framework/types.pb.h"
#include "tf/signature.h"

namespace cbam_ops {
namespace tf {

inline constexpr int64_t kUnknown = -1;

// What the attributes of an op say, before any shape is known.
struct Attributes {
  tensorflow::DataType map_type = tensorflow::DT_INVALID;      // T
  tensorflow::DataType compute_type = tensorflow::DT_INVALID;  // U
  std::string data_format = "NHWC";
  std::string pooling = "avg+max";
  std::string mlp_activation = "none";
  std::string activation = "none";
  std::string order = "channel_first";
  float epsilon = 1e-3f;
  int num_gamma = 0;
  int num_residual = 0;
  int num_y = 0;
  int num_d_residual = 0;
};

// The definition of each attribute of an op of this kind, as REGISTER_OP wants it, but for T, U and
// the counts of optional arguments.
absl::InlinedVector<std::string, 6> AttributeDefinitions(Kind kind);

// Turns attributes into the core's terms (all but the sizes), or says which of them do not fit
// together.
absl::Status MakeOptions(const char* op, Kind kind, bool is_gradient, const Attributes& attributes,
                         Problem* options);

// Reads the attributes of an op through `context->GetAttr(name, &value)`, in the core's terms.
template <typename SignatureT, typename Context>
absl::Status ReadOptions(const SignatureT& signature, Context* context, Problem* options) {
  Attributes attributes;
  absl::Status status;
  const auto read = [&](const char* name, auto* value) {
    if (status.ok()) status = context->GetAttr(name, value);
  };
  const bool channel_gate = Has(signature.kind, Part::kChannelGate);
  const bool spatial_gate = Has(signature.kind, Part::kSpatialGate);
  read("T", &attributes.map_type);
  read("data_format", &attributes.data_format);
  if (signature.kind != Kind::kPool) {
    read("U", &attributes.compute_type);
    read("activation", &attributes.activation);
  }
  if (signature.kind == Kind::kCbam) read("order", &attributes.order);
  if (signature.kind == Kind::kChannelAttention) read("pooling", &attributes.pooling);
  if (channel_gate) read("mlp_activation", &attributes.mlp_activation);
  if (spatial_gate) read("epsilon", &attributes.epsilon);
  const auto read_count = [&](const Argument& argument) {
    const std::string count = argument.count;
    if (count.empty() || !Has(signature.kind, argument.part)) return;
    if (count == "num_gamma") read(argument.count, &attributes.num_gamma);
    if (count == "num_residual") read(argument.count, &attributes.num_residual);
    if (count == "num_y") read(argument.count, &attributes.num_y);
    if (count == "num_d_residual") read(argument.count, &attributes.num_d_residual);
  };
  for (const auto& input : signature.inputs) read_count(input.argument);
  for (const auto& output : signature.outputs) read_count(output.argument);
  if (!status.ok()) return status;
  return MakeOptions(signature.op, signature.kind, SignatureT::kIsGradient, attributes, options);
}

// The sizes of the named dimensions, learnt from one argument after the other. Sizes and ranks may
// be unknown.
class Dimensions {
 public:
  Dimensions(const char* op, const Problem& options);

  // Checks that the shape fits what is known already, and learns from it. `rank` may be kUnknown.
  absl::Status Learn(const Argument& argument, const int64_t* sizes, int rank);

  // The shape of an argument, with kUnknown where nothing is known.
  absl::InlinedVector<int64_t, 4> Shape(const Argument& argument) const;

  // The options together with the sizes, all of which must be known.
  Problem ToProblem() const;

 private:
  // In the order of the layout.
  absl::InlinedVector<Dim, 4> InLayout(const Dims& dims) const;
  int64_t Size(Dim dim) const;
  absl::Status Misfit(const Argument& argument, const int64_t* sizes, int rank) const;

  const char* op_;
  const Problem options_;
  std::array<int64_t, kBoundDims> sizes_;
};

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_CHECKS_H_
