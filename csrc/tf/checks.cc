#include "tf/checks.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace cbam_ops {
namespace tf {
namespace {

constexpr const char* kDimNames[] = {"N", "H", "W", "C", "hidden", "k", "statistics", "1", "2"};

const char* Name(Dim dim) { return kDimNames[static_cast<int>(dim)]; }

std::string Text(const int64_t* sizes, int rank) {
  if (rank == kUnknown) return "of unknown rank";
  return absl::StrCat("[",
                      absl::StrJoin(sizes, sizes + rank, ", ",
                                    [](std::string* out, int64_t size) {
                                      size == kUnknown ? absl::StrAppend(out, "?")
                                                       : absl::StrAppend(out, size);
                                    }),
                      "]");
}

}  // namespace

absl::InlinedVector<std::string, 6> AttributeDefinitions(Kind kind) {
  absl::InlinedVector<std::string, 6> definitions = {"data_format: {'NHWC', 'NCHW'} = 'NHWC'"};
  if (Has(kind, Part::kChannelGate)) {
    definitions.push_back("mlp_activation: {'none', 'relu'} = 'none'");
  }
  if (kind == Kind::kChannelAttention) {
    definitions.push_back("pooling: {'avg+max', 'avg', 'max'} = 'avg+max'");
  }
  if (kind == Kind::kCbam) {
    definitions.push_back("order: {'channel_first', 'parallel'} = 'channel_first'");
  }
  if (kind != Kind::kPool) definitions.push_back("activation: {'none', 'relu'} = 'none'");
  if (Has(kind, Part::kSpatialGate)) definitions.push_back("epsilon: float = 0.001");
  return definitions;
}

absl::Status MakeOptions(const char* op, Kind kind, bool is_gradient, const Attributes& attributes,
                         Problem* options) {
  const auto invalid = [op](const auto&... words) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": ", words...));
  };
  switch (attributes.map_type) {
    case tensorflow::DT_FLOAT:
      options->dtype = DataType::kFloat32;
      break;
    case tensorflow::DT_HALF:
      options->dtype = DataType::kFloat16;
      break;
    case tensorflow::DT_BFLOAT16:
      options->dtype = DataType::kBFloat16;
      break;
    case tensorflow::DT_DOUBLE:
      options->dtype = DataType::kFloat64;
      break;
    default:
      return invalid("`x` must have type half, bfloat16, float or double, got ",
                     tensorflow::DataType_Name(attributes.map_type));
  }
  const auto expected =
      attributes.map_type == tensorflow::DT_DOUBLE ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT;
  if (kind != Kind::kPool && attributes.compute_type != expected) {
    return invalid("the weights must have type ", tensorflow::DataType_Name(expected),
                   " beside `x` of type ", tensorflow::DataType_Name(attributes.map_type), ", got ",
                   tensorflow::DataType_Name(attributes.compute_type));
  }
  // TensorFlow holds an op's attributes to their definitions; a custom call's are only checked
  // here.
  const struct {
    const char* name;
    const std::string& value;
    std::initializer_list<const char*> allowed;
  } words[] = {
      {"data_format", attributes.data_format, {"NHWC", "NCHW"}},
      {"pooling", attributes.pooling, {"avg+max", "avg", "max"}},
      {"mlp_activation", attributes.mlp_activation, {"none", "relu"}},
      {"activation", attributes.activation, {"none", "relu"}},
      {"order", attributes.order, {"channel_first", "parallel"}},
  };
  for (const auto& word : words) {
    if (std::find(word.allowed.begin(), word.allowed.end(), word.value) == word.allowed.end()) {
      return invalid("`", word.name, "` must be one of ", absl::StrJoin(word.allowed, ", "),
                     ", got ", word.value);
    }
  }
  for (const auto& [name, count] :
       {std::pair{"gamma", attributes.num_gamma}, std::pair{"residual", attributes.num_residual},
        std::pair{"y", attributes.num_y}, std::pair{"d_residual", attributes.num_d_residual}}) {
    if (count > 1) return invalid("`", name, "` must hold at most 1 tensor, got ", count);
  }
  options->layout = attributes.data_format == "NCHW" ? Layout::kNCHW : Layout::kNHWC;
  options->pooling = attributes.pooling == "avg"   ? Pooling::kAvg
                     : attributes.pooling == "max" ? Pooling::kMax
                                                   : Pooling::kAvgMax;
  options->mlp_activation =
      attributes.mlp_activation == "relu" ? Activation::kRelu : Activation::kNone;
  options->activation = attributes.activation == "relu" ? Activation::kRelu : Activation::kNone;
  options->gates = kind == Kind::kChannelAttention   ? Gates::kChannelOnly
                   : kind == Kind::kSpatialAttention ? Gates::kSpatialOnly
                   : attributes.order == "parallel"  ? Gates::kParallel
                                                     : Gates::kChannelFirst;
  options->batch_norm = attributes.num_gamma == 1;
  options->epsilon = attributes.epsilon;
  if (!(options->epsilon >= 0))
    return invalid("epsilon must be at least 0, got ", options->epsilon);
  const bool relu = options->activation == Activation::kRelu;
  if (is_gradient && kind != Kind::kPool && attributes.num_y != (relu ? 1 : 0)) {
    return invalid("`y` must hold ", relu ? 1 : 0, " tensors with activation='",
                   attributes.activation, "', got ", attributes.num_y);
  }
  if (attributes.num_d_residual == 1 && !relu) {
    return invalid("`d_residual` is `dy` itself with activation='none'; num_d_residual must be 0");
  }
  return absl::OkStatus();
}

Dimensions::Dimensions(const char* op, const Problem& options) : op_(op), options_(options) {
  sizes_.fill(kUnknown);
}

absl::InlinedVector<Dim, 4> Dimensions::InLayout(const Dims& dims) const {
  absl::InlinedVector<Dim, 4> result(dims.dims, dims.dims + dims.rank);
  if (dims.is_map && options_.layout == Layout::kNCHW) {
    result = {dims.dims[0], dims.dims[3], dims.dims[1], dims.dims[2]};
  }
  return result;
}

int64_t Dimensions::Size(Dim dim) const {
  switch (dim) {
    case Dim::kOne:
      return 1;
    case Dim::kTwo:
      return 2;
    case Dim::kStatistics:
      return options_.batch_norm ? 2 : 0;
    default:
      return sizes_[static_cast<int>(dim)];
  }
}

absl::Status Dimensions::Misfit(const Argument& argument, const int64_t* sizes, int rank) const {
  const auto dims = InLayout(argument.dims);
  const std::string names =
      absl::StrJoin(dims, ", ", [](std::string* out, Dim dim) { absl::StrAppend(out, Name(dim)); });
  const std::string known = absl::StrJoin(dims, ", ", [this](std::string* out, Dim dim) {
    Size(dim) == kUnknown ? absl::StrAppend(out, Name(dim)) : absl::StrAppend(out, Size(dim));
  });
  std::string expected = absl::StrCat("[", names, "]");
  if (known != names) absl::StrAppend(&expected, " = [", known, "]");
  return absl::InvalidArgumentError(absl::StrCat(op_, ": `", argument.name, "` must have shape ",
                                                 expected, ", got ", Text(sizes, rank)));
}

absl::Status Dimensions::Learn(const Argument& argument, const int64_t* sizes, int rank) {
  if (rank == kUnknown) return absl::OkStatus();
  if (rank != argument.dims.rank) return Misfit(argument, sizes, rank);
  const auto dims = InLayout(argument.dims);
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == kUnknown) continue;
    const int64_t expected = Size(dims[i]);
    if (expected == kUnknown) {
      if (sizes[i] == 0 && dims[i] != Dim::kBatch) {
        return absl::InvalidArgumentError(absl::StrCat(op_, ": `", argument.name, "` must have ",
                                                       Name(dims[i]), " >= 1, got shape ",
                                                       Text(sizes, rank)));
      }
      if (sizes[i] % 2 == 0 && dims[i] == Dim::kKernel) {
        return absl::InvalidArgumentError(absl::StrCat(
            op_, ": `", argument.name, "` must have an odd k, got shape ", Text(sizes, rank)));
      }
      sizes_[static_cast<int>(dims[i])] = sizes[i];
    } else if (expected != sizes[i]) {
      return Misfit(argument, sizes, rank);
    }
  }
  return absl::OkStatus();
}

absl::InlinedVector<int64_t, 4> Dimensions::Shape(const Argument& argument) const {
  absl::InlinedVector<int64_t, 4> shape;
  for (const Dim dim : InLayout(argument.dims)) shape.push_back(Size(dim));
  return shape;
}

Problem Dimensions::ToProblem() const {
  Problem problem = options_;
  problem.batch = Size(Dim::kBatch);
  problem.height = Size(Dim::kHeight);
  problem.width = Size(Dim::kWidth);
  problem.channels = Size(Dim::kChannels);
  // Ops without a gate lack its size; the defaults stand.
  if (Size(Dim::kHidden) != kUnknown) problem.hidden = Size(Dim::kHidden);
  if (Size(Dim::kKernel) != kUnknown) problem.kernel_size = Size(Dim::kKernel);
  return problem;
}

}  // namespace tf
}  // namespace cbam_ops
