#include "ops/options.h"

#include <string>

namespace cbam_ops {
namespace ops {

bool IsPresent(const Argument& argument, const Options& options) {
  if (!Has(options.problem.module, argument.gate)) return false;
  switch (argument.presence) {
    case Presence::kWithBatchNorm:
      return options.problem.batch_norm;
    case Presence::kWithActivation:
      return options.problem.activation != Activation::kNone;
    case Presence::kResidual:
      return options.residual;
    case Presence::kResidualGradient:
      return options.residual_gradient;
    case Presence::kAlways:
    case Presence::kNullable:
      break;
  }
  return true;
}

const char* Name(DataType type) {
  switch (type) {
    case DataType::kFloat32:
      return "float32";
    case DataType::kFloat16:
      return "float16";
    case DataType::kBFloat16:
      return "bfloat16";
    case DataType::kFloat64:
      return "float64";
  }
  return "unknown";
}

std::string SetTypes(DataType map, DataType compute, Problem* problem) {
  problem->dtype = map;
  if (compute == ComputeType(map)) return {};
  return std::string("the weights must have type ") + Name(ComputeType(map)) +
         " beside `x` of type " + Name(map) + ", got " + Name(compute);
}

std::string SetChoice(const Choice& choice, const std::string& word, Problem* problem) {
  std::string expected;
  int index = 0;
  for (const char* const known : choice.words) {
    if (word == known) {
      choice.set(index, problem);
      return {};
    }
    expected += (index++ > 0 ? ", '" : "'") + std::string(known) + "'";
  }
  return std::string("`") + choice.name + "` must be one of " + expected + ", got '" + word + "'";
}

std::string SetEpsilon(double epsilon, Problem* problem) {
  problem->epsilon = epsilon;
  if (epsilon >= 0) return {};
  return std::string("`") + kEpsilon + "` must be at least 0, got " + std::to_string(epsilon);
}

std::string SetCount(const Argument& argument, int64_t count, Options* options) {
  const std::string name = std::string("`") + argument.name + "`";
  if (count < 0 || count > 1)
    return name + " must hold at most 1 tensor, got " + std::to_string(count);
  const bool activation = options->problem.activation != Activation::kNone;
  switch (argument.presence) {
    case Presence::kWithBatchNorm:
      options->problem.batch_norm = count == 1;
      break;
    case Presence::kWithActivation:
      if (count == (activation ? 1 : 0)) break;
      return name + " must hold " +
             (activation ? "1 tensors with activation='relu'"
                         : "0 tensors with activation='none'") +
             ", got " + std::to_string(count);
    case Presence::kResidual:
      options->residual = count == 1;
      break;
    case Presence::kResidualGradient:
      options->residual_gradient = count == 1;
      if (count == 0 || activation) break;
      return name + " is `dy` itself with activation='none'; " + CountAttribute(argument.presence) +
             " must be 0";
    case Presence::kAlways:
    case Presence::kNullable:
      break;
  }
  return {};
}

}  // namespace ops
}  // namespace cbam_ops
