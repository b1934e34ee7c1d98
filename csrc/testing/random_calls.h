// Random calls of every op through a core's entry points, for the C++ tests of the CPU kernels
// (core_test.cc) and of the CUDA ones that run on a CPU (cuda_on_cpu_check.cc).
//
// Arguments come from the table of ops and lie on heap blocks of exactly their sizes; every output
// and, along a random direction of one input, the gradient is held against the definition.
#ifndef CBAM_OPS_TESTING_RANDOM_CALLS_H_
#define CBAM_OPS_TESTING_RANDOM_CALLS_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/contract.h"
#include "ops/dimensions.h"
#include "ops/options.h"
#include "ops/signature.h"
#include "testing/definition.h"

namespace cbam_ops {

inline int failures = 0;

inline void Expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

inline bool IsVolume(const Problem& p) { return p.depth != 1 || p.kernel_depth != 1; }

inline std::string Describe(const Problem& p) {
  static const char* const kModules[] = {"channel_first",     "parallel",     "channel_attention",
                                         "spatial_attention", "channel_pool", "spatial_pool"};
  return std::string(ops::Name(p.dtype)) + (p.layout == Layout::kNHWC ? " NHWC " : " NCHW ") +
         kModules[static_cast<int>(p.module)] + " " + std::to_string(p.batch) + "x" +
         (IsVolume(p) ? std::to_string(p.depth) + "x" : "") + std::to_string(p.height) + "x" +
         std::to_string(p.width) + "x" + std::to_string(p.channels) + " k" +
         (IsVolume(p) ? std::to_string(p.kernel_depth) + "x" : "") +
         std::to_string(p.kernel_height) + "x" + std::to_string(p.kernel_width) +
         (p.batch_norm ? " batch_norm" : "") + (p.activation == Activation::kRelu ? " relu" : "");
}

inline size_t MapSize(const Problem& p) {
  return static_cast<size_t>(p.batch * p.depth * p.height * p.width * p.channels);
}

// --- Calls ---

// What goes into and comes out of an op, by the names of the table.
using Values = std::vector<double>;
using Tensors = std::map<std::string, Values>;

// The digits of a type, the implicit one among them, and its exponent where denormals begin.
struct Format {
  int digits, least_exponent;
  size_t bytes;
};
inline Format FormatOf(DataType type) {
  static constexpr Format kFormats[] = {{24, -126, 4}, {11, -14, 2}, {8, -126, 2}, {53, -1022, 8}};
  return kFormats[static_cast<int>(type)];
}

// Nearest, ties to even; what is too large for a half is infinite.
inline void Store(double value, DataType type, unsigned char* to) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  uint16_t half = 0;
  switch (type) {
    case DataType::kFloat64:
      std::memcpy(to, &value, 8);
      return;
    case DataType::kFloat32:
      std::memcpy(to, &narrow, 4);
      return;
    case DataType::kBFloat16:
      if (!std::isnan(value)) bits += 0x7FFF + ((bits >> 16) & 1);
      half = static_cast<uint16_t>(bits >> 16);
      break;
    case DataType::kFloat16: {
      const double size = std::fabs(value);
      const int exponent = size > 0 && size < INFINITY ? std::max(std::ilogb(size), -14) : -14;
      const double scaled = std::nearbyint(std::ldexp(size, 10 - exponent));
      half = std::isnan(value) ? 0x7E00
             : !(size < 65520)
                 ? 0x7C00
                 : static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(scaled));
      half = static_cast<uint16_t>(half | (std::signbit(value) ? 0x8000 : 0));
      break;
    }
  }
  std::memcpy(to, &half, 2);
}

inline double Load(const unsigned char* from, DataType type) {
  double value;
  float narrow;
  uint16_t half;
  switch (type) {
    case DataType::kFloat64:
      std::memcpy(&value, from, 8);
      return value;
    case DataType::kFloat32:
      std::memcpy(&narrow, from, 4);
      return narrow;
    case DataType::kBFloat16: {
      std::memcpy(&half, from, 2);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(&narrow, &bits, 4);
      return narrow;
    }
    case DataType::kFloat16:
      break;
  }
  std::memcpy(&half, from, 2);
  const int exponent = (half >> 10) & 31, digits = half & 1023;
  value = exponent == 31  ? (digits == 0 ? INFINITY : NAN)
          : exponent == 0 ? std::ldexp(digits, -24)
                          : std::ldexp(1024 + digits, exponent - 25);
  return half & 0x8000 ? -value : value;
}

// Memory for a call, full of NaN.
class Workspace {
 public:
  explicit Workspace(size_t bytes)
      : memory_(static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 511) / 256 * 256)),
                std::free) {
    std::memset(memory_.get(), 0xFF, bytes);
  }
  void* get() { return memory_.get(); }

 private:
  std::unique_ptr<unsigned char, void (*)(void*)> memory_;
};

// The sizes of every dimension, of which the problem's arguments have theirs.
inline ops::Dimensions DimensionsOf(const Problem& p) {
  ops::Dimensions dimensions(p);
  const int64_t weights[] = {p.channels, p.hidden};
  std::vector<int64_t> kernel = {p.kernel_height, p.kernel_width, 2, 1};
  std::vector<int64_t> map = {p.batch, p.height, p.width, p.channels};
  if (IsVolume(p)) {
    kernel.insert(kernel.begin(), p.kernel_depth);
    map.insert(map.begin() + 1, p.depth);
  }
  if (p.layout == Layout::kNCHW) std::rotate(map.begin() + 1, map.end() - 1, map.end());
  const auto type = ops::ArgumentType::kMapType;
  const int rank = static_cast<int>(map.size());
  dimensions.Learn({"a map", type, ops::kMap}, map.data(), rank);
  dimensions.Learn({"weights", type, ops::kW0}, weights, 2);
  dimensions.Learn({"a kernel", type, ops::kConvolution}, kernel.data(), rank);
  return dimensions;
}

inline size_t SizeOf(const ops::Argument& argument, const ops::Dimensions& dimensions) {
  size_t size = 1;
  for (const int64_t side : dimensions.ShapeOf(argument)) size *= static_cast<size_t>(side);
  return size;
}

// Calls an op with what `tensors` has of its inputs, and adds its outputs. The kernels' `way` of
// running it is theirs to interpret. `takes_over()` says, of an output and an input in whose memory
// it may lie, whether it does.
template <typename Kernels, typename Args, typename TakesOver>
void Call(const ops::Signature<Args>& signature, const ops::Options& options, int way,
          Tensors* tensors, const TakesOver& takes_over) {
  const Problem& p = options.problem;
  const ops::Dimensions dimensions = DimensionsOf(p);
  using Block = std::vector<unsigned char>;
  std::map<std::string, Block> blocks;
  const auto block = [&](const ops::Argument& argument) -> Block* {
    if (!ops::IsPresent(argument, options)) return nullptr;
    const size_t bytes = FormatOf(ops::TypeOf(argument, p.dtype)).bytes;
    return &(blocks[argument.name] = Block(SizeOf(argument, dimensions) * bytes, 0xFF));
  };
  Args args;
  for (const auto& input : signature.inputs) {
    if (tensors->count(input.argument.name) == 0) continue;
    Block* const to = block(input.argument);
    if (to == nullptr) continue;
    const DataType type = ops::TypeOf(input.argument, p.dtype);
    const Values& values = tensors->at(input.argument.name);
    for (size_t i = 0; i < values.size(); ++i)
      Store(values[i], type, to->data() + i * FormatOf(type).bytes);
    args.*input.pointer = to->data();
  }
  std::map<std::string, const Block*> results;
  std::set<std::string> taken;
  for (const auto& output : signature.outputs) {
    if (!ops::IsPresent(output.argument, options)) continue;
    Block* to = nullptr;
    for (const char* name : output.takes_over) {
      if (to == nullptr && name != nullptr && blocks.count(name) > 0 && taken.count(name) == 0 &&
          takes_over()) {
        to = &blocks[name];
        taken.insert(name);
      }
    }
    if (to == nullptr) to = block(output.argument);
    args.*output.pointer = to->data();
    results[output.argument.name] = to;
  }

  Workspace workspace(Kernels::template WorkspaceBytes<Args>(p, way));
  const Status status = Kernels::Run(p, args, workspace.get(), way);
  Expect(status.ok(), std::string(signature.op) + " of " + Describe(p) + ": " + status.message);

  for (const auto& output : signature.outputs) {
    const auto from = results.find(output.argument.name);
    if (from == results.end()) continue;
    const DataType type = ops::TypeOf(output.argument, p.dtype);
    Values& values = (*tensors)[output.argument.name];
    for (size_t i = 0; i < from->second->size(); i += FormatOf(type).bytes)
      values.push_back(Load(from->second->data() + i, type));
  }
}
template <typename Kernels, typename Args>
void Call(const ops::Signature<Args>& signature, const ops::Options& options, int way,
          Tensors* tensors) {
  Call<Kernels>(signature, options, way, tensors, [] { return false; });
}

// Whether an input of a gradient's op comes from above, and not from the forward pass.
inline bool IsGradient(const std::string& name) { return name == "dy" || name.rfind("d_", 0) == 0; }

// --- Random calls ---

// Ones, primes, and what lies around the widths of vectors and tiles.
constexpr int64_t kSides[] = {1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33};
constexpr int64_t kChannels[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129, 257};
constexpr int64_t kLong[][4] = {{1, 1, 1009, 2}, {1, 601, 1, 2}, {5, 1, 1, 1031},
                                {9, 1, 2, 600},  {67, 1, 2, 5},  {150, 2, 1, 3},
                                {1, 2, 143, 9},  {90, 1, 1, 7},  {0, 3, 4, 5}};
constexpr size_t kMapValues = 4000;
// More work than the CPU kernels do on one thread, of one sample and of many.
constexpr int64_t kLarge[][4] = {{1, 61, 23, 128}, {1, 130, 40, 33}, {2, 40, 41, 64},
                                 {5, 30, 30, 65},  {16, 14, 14, 64}, {3, 9, 7, 1031}};

enum class Fill {
  kNormal,
  kRelu,
  kSteps,
  kEqual,
  kZeros,
  kOffset,
  kDenormal,
  kHuge,
  kSaturated,
  kNotFinite
};
constexpr int kFills = 10;

// A call and its gradient's, which follow from a number; of a large one only bits are compared, as
// the definition takes long. `Kernels` has
//   Choose(pick)          what it may choose at random for all that follows; pick(n) is below n
//   kTypes                of maps
//   Ways(pick)            two ways of running a call, which are to give the same bits
//   WorkspaceBytes, Run   the entry points of a core, with a way
//   kTakesOver            whether outputs may lie where inputs were
//   Holds(fill)           whether gradients with such maps are within the bounds
template <typename Kernels>
class RandomCall {
 public:
  explicit RandomCall(uint64_t number, bool is_large = false)
      : engine_(number), number_(number), is_large_(is_large) {
    const auto pick = [this](size_t count) { return Pick(count); };
    Kernels::Choose(pick);
    Problem& p = options_.problem;
    p.dtype = Kernels::kTypes[Pick(std::size(Kernels::kTypes))];
    p.module = static_cast<Module>(Pick(6));
    for (const ops::Choice& choice : ops::kChoices) {
      if (std::strcmp(choice.name, "order") == 0) continue;  // the module
      choice.set(Pick(static_cast<int>(choice.words.end() - choice.words.begin())), &p);
    }
    p.batch_norm = HasSpatialGate(p) && Pick(3) == 0;
    p.epsilon = Pick(2) == 0 ? 1e-5 : 1e-3;
    p.hidden = OneOf({1, 2, 3, 8, 17, 65});
    p.kernel_height = OneOf({1, 3, 5, 7, 11});
    p.kernel_width = Pick(2) == 0 ? p.kernel_height : OneOf({1, 3, 5, 7, 11});
    do {
      p.batch = 1 + Pick(4);
      p.height = kSides[Pick(std::size(kSides))];
      p.width = kSides[Pick(std::size(kSides))];
      p.channels = kChannels[Pick(std::size(kChannels))];
    } while (MapSize(p) > kMapValues);
    if (is_large_ || Pick(8) == 0) {
      const auto& sizes =
          is_large_ ? kLarge[Pick(std::size(kLarge))] : kLong[Pick(std::size(kLong))];
      p.batch = sizes[0];
      p.height = sizes[1];
      p.width = sizes[2];
      p.channels = sizes[3];
    }
    if (Pick(4) == 0) {  // a volume
      const int64_t slices = OneOf({1, 2, 3, 5});
      if (slices * static_cast<int64_t>(MapSize(p)) <= static_cast<int64_t>(kMapValues))
        p.depth = slices;
      p.kernel_depth = OneOf({1, 3, 5, 7});
    }
    const bool map = HasChannelGate(p) || HasSpatialGate(p);
    options_.residual = map && Pick(2) == 0;
    options_.residual_gradient = options_.residual && p.activation == Activation::kRelu;
    fill_ = static_cast<Fill>(Pick(kFills));
  }

  void Check() {
    switch (options_.problem.module) {
      case Module::kChannelPool:
        return Check(ops::kChannelPool, ops::kChannelPoolGrad);
      case Module::kSpatialPool:
        return Check(ops::kSpatialPool, ops::kSpatialPoolGrad);
      default:
        return Check(ops::kCbam, ops::kCbamGrad);
    }
  }

  // How much of what is allowed the errors take, and the calls whose gradients were compared.
  static inline double strain = 0;
  static inline int64_t compared = 0;

 private:
  int Pick(size_t count) { return static_cast<int>(engine_() % count); }
  int64_t OneOf(std::initializer_list<int64_t> values) {
    return values.begin()[Pick(values.size())];
  }
  std::string Text(const std::string& name) const {
    return name + " of " + (is_large_ ? "large call " : "call ") + std::to_string(number_) + ", " +
           Describe(options_.problem) + " (" + Kernels::Name() + ")";
  }

  Values Draw(const ops::Argument& argument) {
    const Problem& p = options_.problem;
    const ops::Dimensions dimensions = DimensionsOf(p);
    const DataType type = ops::TypeOf(argument, p.dtype);
    const ops::Shape shape = dimensions.ShapeOf(argument);
    const std::string name = argument.name;
    const bool small = fill_ == Fill::kOffset || fill_ == Fill::kHuge;
    double scale = 1;  // weights keep logits near 1, or far from it
    if (name == "w0" || name == "kernel") scale = small ? 1e-3 : fill_ == Fill::kSaturated ? 8 : 1;
    if (shape.rank > 1 && !argument.dims.is_map)
      scale /= std::pow(static_cast<double>(shape.sizes[0]), shape.rank / 4.0);
    std::normal_distribution<double> normal;
    Values values(SizeOf(argument, dimensions));
    for (double& value : values) {
      value = normal(engine_) * scale;
      if (name == "x") value = Filled(value);
      if (IsGradient(name)) value = static_cast<double>(Pick(17) - 8) / 8;
      unsigned char bytes[8];
      Store(value, type, bytes);
      value = Load(bytes, type);
    }
    return values;
  }
  double Filled(double value) {
    const Format format = FormatOf(options_.problem.dtype);
    switch (fill_) {
      case Fill::kRelu:
        return std::max(value, 0.0);
      case Fill::kSteps:
        return std::round(value);
      case Fill::kEqual:
        return 0.5;
      case Fill::kZeros:
        return std::copysign(0.0, value);
      case Fill::kOffset:
        return 1000 + value / 16;
      case Fill::kDenormal:
        return std::ldexp(value, format.least_exponent - 3);
      case Fill::kHuge:
        return 2000 * value;
      case Fill::kNotFinite:
        return Pick(50) > 0 ? value : value < -0.5 ? -INFINITY : value > 0.5 ? INFINITY : NAN;
      case Fill::kNormal:
      case Fill::kSaturated:
        break;
    }
    return value;
  }

  template <typename Args, typename GradArgs>
  void Check(const ops::Signature<Args>& signature, const ops::Signature<GradArgs>& gradient) {
    Tensors given;
    for (const auto& input : signature.inputs) {
      const bool optional = input.argument.presence == ops::Presence::kNullable;
      if (ops::IsPresent(input.argument, options_) && !(optional && Pick(3) == 0))
        given[input.argument.name] = Draw(input.argument);
    }
    for (const auto& input : gradient.inputs) {
      const std::string name = input.argument.name;
      const bool optional = input.argument.presence == ops::Presence::kNullable;
      if (IsGradient(name) && ops::IsPresent(input.argument, options_) &&
          !(optional && Pick(2) == 0))
        given[name] = Draw(input.argument);
    }
    Tensors results = given, again = given;
    const std::pair<int, int> ways = Kernels::Ways([this](size_t count) { return Pick(count); });
    for (auto [way, tensors] : {std::pair(ways.first, &results), std::pair(ways.second, &again)}) {
      Call<Kernels>(signature, options_, way, tensors);
      Call<Kernels>(gradient, options_, way, tensors);
    }
    ExpectSame(results, again, "another way of running it changes ");
    if (Kernels::kTakesOver) {
      Tensors in_place = given;
      const int way = Pick(2) == 0 ? ways.first : ways.second;
      const auto some = [this] { return Pick(3) > 0; };
      Call<Kernels>(signature, options_, way, &in_place, some);
      Call<Kernels>(gradient, options_, way, &in_place, some);
      ExpectSame(results, in_place, "outputs where inputs were change ");
    }
    if (is_large_) return;
    if (fill_ == Fill::kNotFinite && !options_.problem.batch_norm) {
      Tensors calm = given;
      for (double& value : calm["x"]) value = std::isfinite(value) ? value : 1;
      Call<Kernels>(signature, options_, ways.first, &calm);
      Call<Kernels>(gradient, options_, ways.first, &calm);
      CompareSamples(given.at("x"), results.at("dx"), calm.at("dx"));
    }
    Compare(signature, given, results);
  }

  void ExpectSame(const Tensors& results, const Tensors& others, const std::string& what) const {
    for (const auto& [name, values] : results) {
      const bool same = std::equal(values.begin(), values.end(), others.at(name).begin(),
                                   [](double a, double b) { return a == b || (a != a && b != b); });
      Expect(same, Text(what + name));
    }
  }

  // What is not finite stays in its sample.
  void CompareSamples(const Values& x, const Values& dx, const Values& calm) {
    const auto size = static_cast<std::ptrdiff_t>(
        x.size() / static_cast<size_t>(std::max<int64_t>(1, options_.problem.batch)));
    for (std::ptrdiff_t n = 0; n < options_.problem.batch * size; n += size) {
      const bool finite = std::all_of(x.begin() + n, x.begin() + n + size,
                                      [](double value) { return std::isfinite(value); });
      Expect(!finite || std::equal(dx.begin() + n, dx.begin() + n + size, calm.begin() + n),
             Text("another sample's NaN or infinity is in dx"));
    }
  }

  template <typename Args>
  void Compare(const ops::Signature<Args>& signature, const Tensors& given,
               const Tensors& results) {
    const Problem& p = options_.problem;
    const DataType compute_type = ComputeType(p.dtype);
    Numbers inputs;
    std::vector<std::string> names;
    for (const auto& input : signature.inputs) {
      const auto found = given.find(input.argument.name);
      if (found == given.end()) continue;
      inputs[found->first].assign(found->second.begin(), found->second.end());
      names.push_back(found->first);
    }
    // One element finds what is wrong with it alone, all of them find any that is.
    const std::string& name = names[static_cast<size_t>(Pick(names.size()))];
    std::vector<Number>& direction = inputs[name];
    const bool one = Pick(2) == 0 && !direction.empty();
    const size_t chosen = one ? static_cast<size_t>(Pick(direction.size())) : 0;
    for (size_t i = 0; i < direction.size(); ++i) {
      if (!one || i == chosen) direction[i].tangent = static_cast<double>(Pick(17) - 8) / 8;
    }
    const auto result = [&results](const char* of) {
      const auto found = results.find(of);
      return found == results.end() ? Values() : found->second;
    };
    const Definition definition(p, inputs,
                                p.activation == Activation::kRelu ? result("y") : Values(),
                                result("channel_gate"), compute_type);
    if (!definition.IsClear()) return;
    Sum loss;
    for (const auto& output : signature.outputs) {
      const auto found = definition.outputs().find(output.argument.name);
      if (found == definition.outputs().end()) continue;
      const std::vector<Number>& expected = found->second;
      const Values& actual = results.at(found->first);
      const auto d = given.find(found->first == "y" ? "dy" : "d_" + found->first);
      if (actual.size() != expected.size()) {
        Expect(false, Text(found->first) + ": has another size");
        continue;
      }
      bool good = true;
      for (size_t i = 0; i < actual.size(); ++i) {
        good = good && Hold(Text(found->first), actual[i], expected[i].value, expected[i].error,
                            ops::TypeOf(output.argument, p.dtype));
        if (d != given.end()) loss.Add(expected[i] * Number(d->second[i]));
      }
    }
    if (fill_ == Fill::kNotFinite || !Kernels::Holds(fill_)) return;
    ++compared;
    const auto gradient = results.find(name == "residual" ? "d_residual" : "d" + name);
    // Without an activation a residual's gradient is dy itself, and not a result.
    if (gradient == results.end()) return;
    const DataType type = name == "x" || name == "residual" ? p.dtype : compute_type;
    const Format own = FormatOf(type);
    long double product = 0;
    double rounded = 0;
    for (size_t i = 0; i < direction.size(); ++i) {
      const double term = gradient->second[i] * direction[i].tangent;
      product += term;
      rounded += std::fabs(term) + std::ldexp(std::fabs(direction[i].tangent), own.least_exponent);
    }
    Hold(Text("the gradient of " + name), static_cast<double>(product), loss.Total().tangent,
         loss.Total().tangent_error, compute_type, std::ldexp(rounded, -own.digits));
  }

  // A result against the truth: not NaN or infinite where that is not, and within the roundings
  // that an evaluation in the compute type takes, one more to its own type, and `more`.
  bool Hold(const std::string& what, double actual, double truth, double error, DataType type,
            double more = 0) {
    const Format own = FormatOf(type), compute = FormatOf(ComputeType(type));
    const double largest = std::ldexp(1.0, 1 - own.least_exponent);  // near the largest number
    const bool far = std::fabs(truth) > largest;
    const bool kind = std::isnan(actual) == std::isnan(truth) &&
                      (std::isinf(actual) ? far && std::signbit(actual) == std::signbit(truth)
                                          : !std::isinf(truth));
    double allowed = kRoundings * std::ldexp(error, -compute.digits) + more;
    if (own.digits != compute.digits)
      allowed += std::ldexp(std::fabs(truth) + std::ldexp(1.0, own.least_exponent), -own.digits);
    const double off = std::fabs(actual - truth);
    const bool comparable = std::isfinite(actual) && std::isfinite(truth) && std::isfinite(allowed);
    if (comparable && allowed > 0) strain = std::max(strain, off / allowed);
    if (kind && (!comparable || off <= allowed)) return true;
    char numbers[120];
    std::snprintf(numbers, sizeof numbers, ": %.17g instead of %.17g, allowed %.3g", actual, truth,
                  allowed);
    Expect(false, what + numbers);
    return false;
  }
  static constexpr double kRoundings = 4;

  std::mt19937_64 engine_;
  const uint64_t number_;
  const bool is_large_;
  ops::Options options_;
  Fill fill_ = Fill::kNormal;
};

}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_RANDOM_CALLS_H_
