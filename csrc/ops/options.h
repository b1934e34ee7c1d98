// The options of an op: read from wherever a caller has them, checked, and put into the core's
// terms.
//
// Errors are texts without the op's name, empty where there is none.
#ifndef CBAM_OPS_OPS_OPTIONS_H_
#define CBAM_OPS_OPS_OPTIONS_H_

#include <string>

#include "core/contract.h"
#include "ops/signature.h"

namespace cbam_ops {
namespace ops {

// All of a call but its sizes.
struct Options {
  Problem problem;
  bool residual = false;           // whether there is one
  bool residual_gradient = false;  // whether it is wanted
};

// Whether a call has this argument.
bool IsPresent(const Argument& argument, const Options& options);

const char* Name(DataType type);  // "float32", "float16", "bfloat16", "float64"

// Each sets one option.
std::string SetChoice(const Choice& choice, const std::string& word, Problem* problem);
std::string SetEpsilon(double epsilon, Problem* problem);
// The number of tensors in an argument that is a list; after the choices.
std::string SetCount(const Argument& argument, int64_t count, Options* options);
std::string SetTypes(DataType map, DataType compute, Problem* problem);

// Reads the attributes of an op. `reader` has `DataType Type(name)`, `std::string Word(name)`,
// `double Number(name)` and `int64_t Count(name)`; what it does about an attribute that is missing
// is its own affair.
template <typename Args, typename Reader>
std::string ReadOptions(const Signature<Args>& signature, Reader* reader, Options* options) {
  *options = {};
  Problem* const problem = &options->problem;
  problem->module = signature.module;
  const DataType map = reader->Type("T");
  std::string error =
      SetTypes(map, UsesComputeType(signature) ? reader->Type("U") : ComputeType(map), problem);
  for (const Choice& choice : kChoices) {
    if (error.empty() && choice.is_of(signature.module))
      error = SetChoice(choice, reader->Word(choice.name), problem);
  }
  if (error.empty() && HasSpatialGate(signature.module))
    error = SetEpsilon(reader->Number(kEpsilon), problem);
  ForEachArgument(signature, [&](const Argument& argument) {
    const char* const count = CountAttribute(argument.presence);
    if (error.empty() && count != nullptr)
      error = SetCount(argument, reader->Count(count), options);
  });
  return error;
}

}  // namespace ops
}  // namespace cbam_ops

#endif  // CBAM_OPS_OPS_OPTIONS_H_
