// Checked arguments for the Python module: options by name, arrays by named dimensions.
//
// Nothing here knows where the memory lies, but for ArrayInput: entry points that take pointers to
// a device share the rest.
#ifndef CBAM_OPS_PYTHON_ARGUMENTS_H_
#define CBAM_OPS_PYTHON_ARGUMENTS_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/contract.h"

namespace cbam_ops {
namespace python {

namespace py = pybind11;

using Shape = std::vector<int64_t>;

// A dimension with its name in messages; `size` -1 takes any.
struct Dimension {
  const char* name;
  int64_t size;
};
using Dimensions = std::vector<Dimension>;

[[noreturn]] inline void Refuse(const std::string& function, const std::string& argument,
                                const std::string& expected, const std::string& received) {
  throw py::value_error(function + ": `" + argument + "` must " + expected + ", got " + received);
}

inline std::string ToString(const Shape& shape) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << "]";
  return out.str();
}

// "shape [C, hidden] = [64, hidden]".
inline std::string ToString(const Dimensions& dimensions) {
  std::ostringstream names, sizes;
  bool same = true;
  for (size_t i = 0; i < dimensions.size(); ++i) {
    const Dimension& dimension = dimensions[i];
    const std::string size = dimension.size < 0 ? dimension.name : std::to_string(dimension.size);
    same = same && size == dimension.name;
    names << (i ? ", " : "") << dimension.name;
    sizes << (i ? ", " : "") << size;
  }
  return "shape [" + names.str() + "]" + (same ? "" : " = [" + sizes.str() + "]");
}

inline void CheckShape(const std::string& function, const std::string& argument,
                       const Dimensions& expected, const Shape& shape) {
  bool fits = shape.size() == expected.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = expected[i].size < 0 || expected[i].size == shape[i];
  }
  if (!fits) Refuse(function, argument, "have " + ToString(expected), ToString(shape));
}

template <typename Value>
Value ParseChoice(const std::string& function, const std::string& argument,
                  const std::string& received,
                  std::initializer_list<std::pair<const char*, Value>> choices) {
  std::string names;
  for (const auto& choice : choices) {
    if (received == choice.first) return choice.second;
    names += std::string(names.empty() ? "'" : ", '") + choice.first + "'";
  }
  Refuse(function, argument, "be one of " + names, "'" + received + "'");
}

inline Layout ParseLayout(const std::string& function, const std::string& value) {
  return ParseChoice<Layout>(function, "layout", value,
                             {{"NHWC", Layout::kNHWC}, {"NCHW", Layout::kNCHW}});
}

inline Activation ParseActivation(const std::string& function, const char* argument,
                                  const std::optional<std::string>& value) {
  return ParseChoice<Activation>(function, argument, value.value_or("none"),
                                 {{"none", Activation::kNone}, {"relu", Activation::kRelu}});
}

inline Module ParseGates(const std::string& function, const std::string& value) {
  return ParseChoice<Module>(function, "gates", value,
                             {{"channel_first", Module::kChannelFirst},
                              {"parallel", Module::kParallel},
                              {"channel_only", Module::kChannelAttention},
                              {"spatial_only", Module::kSpatialAttention}});
}

inline Pooling ParsePooling(const std::string& function, const std::string& value) {
  return ParseChoice<Pooling>(
      function, "pooling", value,
      {{"avg+max", Pooling::kAvgMax}, {"avg", Pooling::kAvg}, {"max", Pooling::kMax}});
}

// Everything about a problem but its sizes.
struct Options {
  std::string layout = "NHWC";
  std::string gates = "channel_first";
  std::string pooling = "avg+max";
  std::optional<std::string> mlp_activation;
  std::optional<std::string> activation;
  bool batch_norm = false;
  double epsilon = 1e-3;
};

inline Problem ParseOptions(const std::string& function, const Options& options) {
  Problem problem;
  problem.layout = ParseLayout(function, options.layout);
  problem.module = ParseGates(function, options.gates);
  problem.pooling = ParsePooling(function, options.pooling);
  problem.mlp_activation = ParseActivation(function, "mlp_activation", options.mlp_activation);
  problem.activation = ParseActivation(function, "activation", options.activation);
  problem.batch_norm = options.batch_norm;
  problem.epsilon = options.epsilon;
  if (!(options.epsilon >= 0)) {
    Refuse(function, "epsilon", "be at least 0", std::to_string(options.epsilon));
  }
  if (options.batch_norm && !HasSpatialGate(problem)) {
    Refuse(function, "batch_norm", "be False without a spatial gate", "True");
  }
  return problem;
}

inline const char* TypeName(DataType type) {
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

// uint16 stands for the bits of a bfloat16: numpy itself has no such type.
inline std::optional<DataType> TypeFromName(const std::string& name) {
  if (name == "float32") return DataType::kFloat32;
  if (name == "float16") return DataType::kFloat16;
  if (name == "bfloat16" || name == "uint16") return DataType::kBFloat16;
  if (name == "float64") return DataType::kFloat64;
  return std::nullopt;
}

inline void SetMapSizes(const std::string& function, const char* argument, const Shape& shape,
                        Problem* problem) {
  const bool channels_last = problem->layout == Layout::kNHWC;
  CheckShape(function, argument,
             channels_last ? Dimensions{{"N", -1}, {"H", -1}, {"W", -1}, {"C", -1}}
                           : Dimensions{{"N", -1}, {"C", -1}, {"H", -1}, {"W", -1}},
             shape);
  problem->batch = shape[0];
  problem->height = shape[channels_last ? 1 : 2];
  problem->width = shape[channels_last ? 2 : 3];
  problem->channels = shape[channels_last ? 3 : 1];
}

// The shapes that a problem gives the tensors around it.
inline Dimensions MapDimensions(const Problem& p) {
  return p.layout == Layout::kNHWC
             ? Dimensions{{"N", p.batch}, {"H", p.height}, {"W", p.width}, {"C", p.channels}}
             : Dimensions{{"N", p.batch}, {"C", p.channels}, {"H", p.height}, {"W", p.width}};
}
inline Dimensions ChannelGateDimensions(const Problem& p) {
  return {{"N", p.batch}, {"C", p.channels}};
}
inline Dimensions ChannelDescriptorDimensions(const Problem& p) {
  return {{"2", 2}, {"N", p.batch}, {"C", p.channels}};
}
inline Dimensions SpatialGateDimensions(const Problem& p) {
  return {{"N", p.batch}, {"H", p.height}, {"W", p.width}};
}
inline Dimensions SpatialDescriptorDimensions(const Problem& p) {
  return {{"N", p.batch}, {"2", 2}, {"H", p.height}, {"W", p.width}};
}
// Of the spatial pool on its own, which keeps the layout of the map.
inline Dimensions SpatialPoolDimensions(const Problem& p) {
  return p.layout == Layout::kNHWC
             ? Dimensions{{"N", p.batch}, {"H", p.height}, {"W", p.width}, {"2", 2}}
             : Dimensions{{"N", p.batch}, {"2", 2}, {"H", p.height}, {"W", p.width}};
}
inline Dimensions KernelDimensions(const Problem& p) {
  return {{"k", p.kernel_size}, {"k", p.kernel_size}, {"2", 2}, {"1", 1}};
}
inline Dimensions W0Dimensions(const Problem& p) {
  return {{"C", p.channels}, {"hidden", p.hidden}};
}
inline Dimensions W1Dimensions(const Problem& p) {
  return {{"hidden", p.hidden}, {"C", p.channels}};
}
inline Dimensions B0Dimensions(const Problem& p) { return {{"hidden", p.hidden}}; }
inline Dimensions B1Dimensions(const Problem& p) { return {{"C", p.channels}}; }
inline Dimensions ScalarDimensions() { return {{"1", 1}}; }
inline Dimensions PairDimensions() { return {{"2", 2}}; }

inline Shape ToShape(const Dimensions& dimensions) {
  Shape shape;
  for (const Dimension& dimension : dimensions) shape.push_back(dimension.size);
  return shape;
}

inline void SetHidden(const std::string& function, const Shape& w0, Problem* problem) {
  CheckShape(function, "w0", {{"C", problem->channels}, {"hidden", -1}}, w0);
  if (w0[1] < 1) Refuse(function, "w0", "have hidden >= 1 in its shape [C, hidden]", ToString(w0));
  problem->hidden = w0[1];
}

inline void SetKernelSize(const std::string& function, const Shape& kernel, Problem* problem) {
  CheckShape(function, "kernel", {{"k", -1}, {"k", -1}, {"2", 2}, {"1", 1}}, kernel);
  if (kernel[0] != kernel[1] || kernel[0] % 2 == 0) {
    Refuse(function, "kernel", "have shape [k, k, 2, 1] with an odd k", ToString(kernel));
  }
  problem->kernel_size = kernel[0];
}

}  // namespace python
}  // namespace cbam_ops

#endif  // CBAM_OPS_PYTHON_ARGUMENTS_H_
