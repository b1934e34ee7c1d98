// A call of an op from Python: its arguments by name, read by the rules of the table.
#ifndef CBAM_OPS_PYTHON_ARGUMENTS_H_
#define CBAM_OPS_PYTHON_ARGUMENTS_H_

#include <pybind11/pybind11.h>

#include <cctype>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/contract.h"
#include "ops/dimensions.h"
#include "ops/options.h"
#include "ops/signature.h"

namespace cbam_ops {
namespace python {

namespace py = pybind11;

inline std::string Text(const py::object& object) { return py::str(object); }

// "channel_pool_grad" for "CbamOps>ChannelPoolGrad".
inline std::string FunctionName(const std::string& op) {
  std::string name;
  for (const char c : op.substr(op.find('>') + 1)) {
    if (std::isupper(c) && !name.empty()) name += '_';
    name += static_cast<char>(std::tolower(c));
  }
  return name;
}

// An option of one half of the module is one of the whole module here: the kernels can do it, and
// the tests try what the kernels can do.
inline bool Takes(Module module, const ops::Choice& choice) {
  return choice.is_of(module) ||
         (HasChannelGate(module) && choice.is_of(Module::kChannelAttention)) ||
         (HasSpatialGate(module) && choice.is_of(Module::kSpatialAttention));
}

inline const std::vector<DataType> kMapTypes = {DataType::kFloat32, DataType::kFloat16,
                                                DataType::kBFloat16, DataType::kFloat64};

class Arguments {
 public:
  // Inputs may be given by position, all else by name.
  template <typename Args>
  Arguments(const ops::Signature<Args>& signature, const py::args& positional,
            const py::kwargs& named)
      : function_(FunctionName(signature.op)) {
    size_t position = 0;
    for (const auto& input : signature.inputs) {
      if (!ops::Has(signature.module, input.argument.gate)) continue;
      if (position == positional.size()) break;
      given_[input.argument.name] = positional[position++];
    }
    if (position < positional.size()) {
      throw py::type_error(function_ + ": takes " + std::to_string(position) +
                           " arguments by position, got " + std::to_string(positional.size()));
    }
    for (const auto& [key, value] : named) {
      const std::string name = py::str(key);
      if (!given_.emplace(name, py::reinterpret_borrow<py::object>(value)).second) {
        throw py::type_error(function_ + ": got `" + name + "` twice");
      }
    }
  }

  const std::string& function() const { return function_; }

  // Ends the call with what is wrong, if anything is.
  void Check(const std::string& error) const {
    if (!error.empty()) throw py::value_error(function_ + ": " + error);
  }
  [[noreturn]] void Refuse(const std::string& argument, const std::string& expected,
                           const std::string& received) const {
    throw py::value_error(function_ + ": `" + argument + "` must " + expected + ", got " +
                          received);
  }
  void Check(const Status& status) const {
    if (status.ok()) return;
    const std::string message =
        status.message + (*status.kernel ? std::string(" (") + status.kernel + ")" : "");
    if (status.code == StatusCode::kInvalidProblem) Check(message);
    throw std::runtime_error(function_ + ": " + message);
  }

  // Whether an optional argument is there: None, False and a null pointer say that it is not.
  bool Has(const std::string& name) const {
    const auto found = given_.find(name);
    if (found == given_.end() || found->second.is_none()) return false;
    return !py::isinstance<py::int_>(found->second) || py::cast<bool>(found->second);
  }

  // Each argument is taken once; None where it was not given.
  py::object Take(const std::string& name) {
    const auto found = given_.find(name);
    if (found == given_.end()) return py::none();
    const py::object value = found->second;
    given_.erase(found);
    return value;
  }

  template <typename T>
  T Take(const std::string& name, const T& otherwise) {
    const py::object value = Take(name);
    if (value.is_none()) return otherwise;
    try {
      return py::cast<T>(value);
    } catch (const py::cast_error&) {
      Refuse(name, "be like " + Text(py::repr(py::cast(otherwise))), Text(py::repr(value)));
    }
  }

  int TakeNumber(const char* name, int otherwise, int least, int most) {
    const int value = Take(name, otherwise);
    if (value >= least && value <= most) return value;
    Refuse(name, "be between " + std::to_string(least) + " and " + std::to_string(most),
           std::to_string(value));
  }

  // uint16 stands for the bits of a bfloat16: numpy itself has no such type.
  DataType TypeFromName(const char* argument, const std::string& name,
                        const std::vector<DataType>& allowed) const {
    std::string expected;
    for (const DataType type : allowed) {
      if (name == ops::Name(type)) return type;
      if (name == "uint16" && type == DataType::kBFloat16) return type;
      expected += std::string(expected.empty() ? "be of " : " or ") + ops::Name(type);
    }
    Refuse(argument, expected, name);
  }

  template <typename Args>
  ops::Options TakeOptions(const ops::Signature<Args>& signature, DataType map) {
    ops::Options options;
    Problem* const problem = &options.problem;
    problem->module = signature.module;
    problem->dtype = map;
    for (const ops::Choice& choice : ops::kChoices) {
      if (!Takes(signature.module, choice)) continue;
      const std::string otherwise = *choice.words.begin();
      Check(ops::SetChoice(choice, Take(choice.name, otherwise), problem));
    }
    if (HasSpatialGate(signature.module)) {
      Check(ops::SetEpsilon(Take(ops::kEpsilon, problem->epsilon), problem));
    }
    // What is a list for TensorFlow is there or not there for us.
    const auto count = [&](const ops::Argument& argument) {
      if (!ops::Has(signature.module, argument.gate)) return;
      if (ops::CountAttribute(argument.presence) == nullptr) return;
      Check(ops::SetCount(argument, Has(argument.name) ? 1 : 0, &options));
    };
    for (const auto& input : signature.inputs) count(input.argument);
    for (const auto& output : signature.outputs) {
      if (output.argument.presence == ops::Presence::kResidualGradient) count(output.argument);
    }
    return options;
  }

  // Refuses what nobody took.
  void Finish() const {
    for (const auto& [name, value] : given_) {
      if (Has(name)) throw py::type_error(function_ + ": takes no argument `" + name + "` here");
    }
  }

 private:
  const std::string function_;
  std::map<std::string, py::object> given_;
};

// Calls an op. `Memory` says where its arrays lie: it has `MapType()`, `Input(argument, map,
// &dimensions)` and `Output(argument, map, dimensions)`, which give addresses, and `Run(problem,
// args)`.
template <typename Memory, typename Args>
py::object Call(const ops::Signature<Args>& signature, const py::args& positional,
                const py::kwargs& named) {
  Arguments arguments(signature, positional, named);
  Memory memory(&arguments);
  const ops::Options options = arguments.TakeOptions(signature, memory.MapType());
  const DataType map = options.problem.dtype;
  ops::Dimensions dimensions(options.problem);
  Args args;
  for (const auto& input : signature.inputs) {
    if (!ops::Has(signature.module, input.argument.gate)) continue;
    const bool present =
        arguments.Has(input.argument.name) || input.argument.presence == ops::Presence::kAlways;
    const void* const data = present ? memory.Input(input.argument, map, &dimensions) : nullptr;
    if (input.pointer != nullptr) args.*input.pointer = data;
  }
  for (const auto& output : signature.outputs) {
    if (!ops::IsPresent(output.argument, options)) continue;
    args.*output.pointer = memory.Output(output.argument, map, dimensions);
  }
  arguments.Finish();
  return memory.Run(dimensions.ToProblem(), args);
}

// "cbam(x, w0, b0=None, ..., *, data_format='NHWC', ..., threads=1)" and what the op does.
template <typename Memory, typename Args>
std::string Doc(const ops::Signature<Args>& signature) {
  std::string text = FunctionName(signature.op) + "(";
  const auto add = [&](const ops::Argument& argument) {
    if (!ops::Has(signature.module, argument.gate)) return;
    const bool optional = argument.presence != ops::Presence::kAlways;
    text += std::string(argument.name) + (optional ? "=None, " : ", ");
  };
  for (const auto& input : signature.inputs) add(input.argument);
  text += "*, ";
  for (const auto& output : signature.outputs) {
    const bool asked_for = output.argument.presence == ops::Presence::kResidualGradient;
    if (Memory::kOutputsAreGiven || asked_for) add(output.argument);
  }
  for (const ops::Choice& choice : ops::kChoices) {
    if (!Takes(signature.module, choice)) continue;
    text += std::string(choice.name) + "='" + *choice.words.begin() + "', ";
  }
  if (HasSpatialGate(signature.module)) {
    text += ops::kEpsilon + ("=" + Text(py::repr(py::cast(Problem().epsilon)))) + ", ";
  }
  return text + Memory::kKeywords + ")\n\n" + signature.doc;
}

template <typename Memory, const auto& kSignature>
void Define(py::module_* module) {
  py::options options;
  options.disable_function_signatures();
  module->def((FunctionName(kSignature.op) + Memory::kSuffix).c_str(),
              [](const py::args& positional, const py::kwargs& named) {
                return Call<Memory>(kSignature, positional, named);
              },
              Doc<Memory>(kSignature).c_str());
}

// Adds a function for every op.
template <typename Memory, const auto&... kSignatures>
void DefineAll(py::module_* module, ops::OpList<kSignatures...>) {
  (Define<Memory, kSignatures>(module), ...);
}

}  // namespace python
}  // namespace cbam_ops

#endif  // CBAM_OPS_PYTHON_ARGUMENTS_H_
