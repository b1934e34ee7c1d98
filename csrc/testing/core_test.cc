// The core without Python or TensorFlow: that it stands alone, and what sanitizers have to say.
//
// Small, and no substitute for tests/test_core.py, which holds every type, shape and option against
// the definition. Here: the forward pass in double against the definition written naively,
// gradients by finite differences, other types against double, equal bits for any threads,
// statuses.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "core/cpu/work_sharing.h"
#include "python/thread_pool.h"
#include "testing/definition.h"

namespace cbam_ops {
namespace {

int failures = 0;

void Expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

template <typename T>
using Values = std::vector<T>;

// Everything that goes into and comes out of a problem, in the compute type; maps of T are made at
// the call.
template <typename A>
struct Tensors {
  Values<A> x, residual, w0, b0, w1, b1, kernel, bias, gamma, dy;
  Values<A> y, channel_descriptors, channel_gate, spatial_descriptors, spatial_gate,
      batch_statistics;
  Values<A> dx, dw0, db0, dw1, db1, dkernel, dbias, dgamma, d_residual;
};

std::string Describe(const Problem& p) {
  static const char* const kTypes[] = {"float32", "float16", "bfloat16", "float64"};
  static const char* const kGates[] = {"channel_first", "parallel", "channel_only", "spatial_only"};
  return std::string(kTypes[static_cast<int>(p.dtype)]) +
         (p.layout == Layout::kNHWC ? " NHWC " : " NCHW ") + kGates[static_cast<int>(p.module)] +
         " " + std::to_string(p.batch) + "x" + std::to_string(p.height) + "x" +
         std::to_string(p.width) + "x" + std::to_string(p.channels) + " k" +
         std::to_string(p.kernel_size) + (p.batch_norm ? " batch_norm" : "") +
         (p.activation == Activation::kRelu ? " relu" : "") + " (" +
         cpu::Name(cpu::ActiveInstructionSet()) + ")";
}

size_t MapSize(const Problem& p) {
  return static_cast<size_t>(p.batch * p.height * p.width * p.channels);
}

Values<double> Random(size_t size, std::mt19937_64* engine) {
  std::normal_distribution<double> normal;
  Values<double> values(size);
  // Few enough digits to be exact in every type, so that all types see the same inputs.
  for (double& value : values) value = std::round(normal(*engine) * 32) / 32;
  return values;
}

Tensors<double> MakeInputs(const Problem& p, unsigned seed) {
  std::mt19937_64 engine(seed);
  const auto c = static_cast<size_t>(p.channels), h = static_cast<size_t>(p.hidden);
  const auto k = static_cast<size_t>(p.kernel_size);
  Tensors<double> t;
  t.x = Random(MapSize(p), &engine);
  t.residual = Random(MapSize(p), &engine);
  t.dy = Random(MapSize(p), &engine);
  t.w0 = Random(c * h, &engine);
  t.b0 = Random(h, &engine);
  t.w1 = Random(c * h, &engine);
  t.b1 = Random(c, &engine);
  t.kernel = Random(2 * k * k, &engine);
  for (double& value : t.kernel) value /= 8;
  t.bias = Random(1, &engine);
  t.gamma = Random(1, &engine);
  return t;
}

// Maps of the narrow types, rounded to nearest by way of float.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

template <typename T>
T FromDouble(double value) {
  if constexpr (std::is_same_v<T, Brain>) {
    const auto narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    return Brain{static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    // The numbers here are multiples of 1/32 below 64: normal ones with at most 11 digits.
    if (value == 0) return Half{0};
    if (std::isnan(value)) return Half{0x7E00};
    if (std::isinf(value)) return Half{static_cast<uint16_t>(value < 0 ? 0xFC00 : 0x7C00)};
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);  // [0.5, 1)
    const auto digits = static_cast<int>(std::lround(fraction * 2048)) - 1024;
    return Half{static_cast<uint16_t>((value < 0 ? 0x8000 : 0) + ((exponent + 14) << 10) + digits)};
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
double ToDouble(T value) {
  if constexpr (std::is_same_v<T, Brain>) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float narrow;
    std::memcpy(&narrow, &bits, 4);
    return narrow;
  } else if constexpr (std::is_same_v<T, Half>) {
    const int exponent = (value.bits >> 10) & 31, digits = value.bits & 1023;
    const double size = exponent == 31  ? (digits == 0 ? INFINITY : NAN)
                        : exponent == 0 ? std::ldexp(digits, -24)
                                        : std::ldexp(1024 + digits, exponent - 25);
    return value.bits & 0x8000 ? -size : size;
  } else {
    return static_cast<double>(value);
  }
}

template <typename To, typename From>
Values<To> Convert(const Values<From>& from) {
  Values<To> to;
  to.reserve(from.size());
  for (const From& value : from) to.push_back(FromDouble<To>(ToDouble(value)));
  return to;
}

// Memory for a call, full of NaN.
class Workspace {
 public:
  explicit Workspace(size_t bytes)
      : memory_(static_cast<unsigned char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64)),
                std::free) {
    std::memset(memory_.get(), 0xFF, bytes);
  }
  void* get() { return memory_.get(); }

 private:
  std::unique_ptr<unsigned char, void (*)(void*)> memory_;
};

// Both passes with maps of type T and all else of type A.
template <typename T, typename A>
Tensors<double> RunKernels(const Problem& p, const Tensors<double>& inputs, int threads) {
  const auto map = MapSize(p);
  const auto n = static_cast<size_t>(p.batch), c = static_cast<size_t>(p.channels);
  const auto positions = static_cast<size_t>(p.height * p.width);
  python::ThreadPool& pool = python::ThreadPool::Shared(threads - 1);
  cpu::WorkSharing sharing(
      threads, [&pool](std::function<void()> closure) { pool.Schedule(std::move(closure)); });
  const cpu::Parallel parallel = sharing.parallel();

  const auto x = Convert<T>(inputs.x), residual = Convert<T>(inputs.residual),
             dy = Convert<T>(inputs.dy);
  const auto w0 = Convert<A>(inputs.w0), b0 = Convert<A>(inputs.b0), w1 = Convert<A>(inputs.w1),
             b1 = Convert<A>(inputs.b1), kernel = Convert<A>(inputs.kernel),
             bias = Convert<A>(inputs.bias), gamma = Convert<A>(inputs.gamma);
  Values<T> y(map), dx(map), d_residual(map);
  Tensors<A> t;
  t.channel_descriptors.resize(2 * n * c);
  t.channel_gate.resize(n * c);
  t.spatial_descriptors.resize(2 * n * positions);
  t.spatial_gate.resize(n * positions);
  t.batch_statistics.resize(2);
  t.dw0.resize(w0.size());
  t.db0.resize(b0.size());
  t.dw1.resize(w1.size());
  t.db1.resize(b1.size());
  t.dkernel.resize(kernel.size());
  t.dbias.resize(1);
  t.dgamma.resize(1);

  ForwardArgs f;
  f.x = x.data();
  f.residual = residual.data();
  f.w0 = w0.data();
  f.b0 = b0.data();
  f.w1 = w1.data();
  f.b1 = b1.data();
  f.kernel = kernel.data();
  f.bias = bias.data();
  f.gamma = gamma.data();
  f.y = y.data();
  f.channel_descriptors = t.channel_descriptors.data();
  f.channel_gate = t.channel_gate.data();
  f.spatial_descriptors = t.spatial_descriptors.data();
  f.spatial_gate = t.spatial_gate.data();
  f.batch_statistics = t.batch_statistics.data();
  {
    Workspace workspace(cpu::WorkspaceBytes<ForwardArgs>(p, parallel));
    const Status status = cpu::Run(p, f, workspace.get(), parallel);
    Expect(status.ok(), "forward of " + Describe(p) + ": " + status.message);
  }

  BackwardArgs b;
  b.x = x.data();
  b.dy = dy.data();
  b.y = y.data();
  b.w0 = w0.data();
  b.b0 = b0.data();
  b.w1 = w1.data();
  b.b1 = b1.data();
  b.kernel = kernel.data();
  b.bias = bias.data();
  b.gamma = gamma.data();
  b.channel_descriptors = f.channel_descriptors;
  b.channel_gate = f.channel_gate;
  b.spatial_descriptors = f.spatial_descriptors;
  b.spatial_gate = f.spatial_gate;
  b.batch_statistics = f.batch_statistics;
  b.dx = dx.data();
  b.d_residual = p.activation == Activation::kRelu ? d_residual.data() : nullptr;
  b.dw0 = t.dw0.data();
  b.db0 = t.db0.data();
  b.dw1 = t.dw1.data();
  b.db1 = t.db1.data();
  b.dkernel = t.dkernel.data();
  b.dbias = t.dbias.data();
  b.dgamma = t.dgamma.data();
  {
    Workspace workspace(cpu::WorkspaceBytes<BackwardArgs>(p, parallel));
    const Status status = cpu::Run(p, b, workspace.get(), parallel);
    Expect(status.ok(), "backward of " + Describe(p) + ": " + status.message);
  }

  Tensors<double> out;
  out.y = Convert<double>(y);
  out.dx = Convert<double>(dx);
  out.d_residual = Convert<double>(d_residual);
  out.dw0 = Convert<double>(t.dw0);
  out.db0 = Convert<double>(t.db0);
  out.dw1 = Convert<double>(t.dw1);
  out.db1 = Convert<double>(t.db1);
  out.dkernel = Convert<double>(t.dkernel);
  out.dbias = Convert<double>(t.dbias);
  out.dgamma = Convert<double>(t.dgamma);
  return out;
}

Tensors<double> Run(const Problem& p, const Tensors<double>& inputs, int threads = 1) {
  switch (p.dtype) {
    case DataType::kFloat32:
      return RunKernels<float, float>(p, inputs, threads);
    case DataType::kFloat16:
      return RunKernels<Half, float>(p, inputs, threads);
    case DataType::kBFloat16:
      return RunKernels<Brain, float>(p, inputs, threads);
    case DataType::kFloat64:
      return RunKernels<double, double>(p, inputs, threads);
  }
  return {};
}

// Largest difference; NaN anywhere is infinitely far.
double Distance(const Values<double>& a, const Values<double>& b) {
  double most = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    const double distance = std::fabs(a[i] - b[i]);
    most = distance <= INFINITY ? std::fmax(most, distance) : INFINITY;
  }
  return most;
}

double Dot(const Values<double>& a, const Values<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

using Member = Values<double> Tensors<double>::*;

// Each gradient along one direction against a difference of the definition's dy . y.
void CheckGradients(const Problem& p, const Tensors<double>& inputs, const Tensors<double>& out) {
  struct Pair {
    const char* name;
    Member input, gradient;
    bool present;
  };
  using T = Tensors<double>;
  const bool channel = HasChannelGate(p), spatial = HasSpatialGate(p);
  const Pair pairs[] = {
      {"x", &T::x, &T::dx, true},
      {"w0", &T::w0, &T::dw0, channel},
      {"b0", &T::b0, &T::db0, channel},
      {"w1", &T::w1, &T::dw1, channel},
      {"b1", &T::b1, &T::db1, channel},
      {"kernel", &T::kernel, &T::dkernel, spatial},
      {"bias", &T::bias, &T::dbias, spatial},
      {"gamma", &T::gamma, &T::dgamma, p.batch_norm},
      {"residual", &T::residual, &T::d_residual, p.activation == Activation::kRelu},
  };
  std::mt19937_64 engine(7);
  std::normal_distribution<double> normal;
  for (const Pair& pair : pairs) {
    if (!pair.present) continue;
    constexpr double kStep = 1e-6;
    Values<double> direction((inputs.*pair.input).size());
    for (double& value : direction) value = normal(engine);
    Tensors<double> above = inputs, below = inputs;
    for (size_t i = 0; i < direction.size(); ++i) {
      (above.*pair.input)[i] += kStep * direction[i];
      (below.*pair.input)[i] -= kStep * direction[i];
    }
    const double numeric =
        (Dot(Define(p, above), inputs.dy) - Dot(Define(p, below), inputs.dy)) / (2 * kStep);
    const double analytic = Dot(out.*pair.gradient, direction);
    Expect(std::fabs(numeric - analytic) <= 2e-6 * (1 + std::fabs(numeric)),
           "gradient of " + std::string(pair.name) + " of " + Describe(p) + ": " +
               std::to_string(analytic) + " instead of " + std::to_string(numeric));
  }
}

// Off the grid that the inputs lie on, so that finite differences meet neither ties nor the corner
// of a ReLU.
void LeaveGrid(Tensors<double>* t) {
  double phase = 1;
  for (Values<double>* values : {&t->x, &t->residual, &t->b0, &t->b1}) {
    for (double& value : *values) value += 1e-3 * std::sin(phase += 1.7);
  }
}

void TestAgainstDefinition() {
  const int64_t shapes[][4] = {{2, 4, 5, 7}, {1, 6, 3, 16}, {3, 1, 9, 5}, {2, 7, 7, 33}};
  int number = 0;
  for (const auto& shape : shapes) {
    for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      for (int gates = 0; gates < 4; ++gates) {
        for (int option = 0; option < 4; ++option, ++number) {
          Problem p;
          p.layout = layout;
          p.module = static_cast<Module>(gates);
          p.batch = shape[0];
          p.height = shape[1];
          p.width = shape[2];
          p.channels = shape[3];
          p.hidden = 1 + number % 3;
          p.kernel_size = 1 + 2 * (number % 4);
          p.pooling = static_cast<Pooling>(number % 3);
          p.mlp_activation = static_cast<Activation>(number / 2 % 2);
          p.activation = static_cast<Activation>(option % 2);
          p.batch_norm = option / 2 == 1 && HasSpatialGate(p);
          p.dtype = DataType::kFloat64;
          const Tensors<double> rounded = MakeInputs(p, static_cast<unsigned>(number));
          Tensors<double> inputs = rounded;
          LeaveGrid(&inputs);
          const Tensors<double> out = Run(p, inputs);
          const double error = Distance(out.y, Define(p, inputs));
          Expect(error < 1e-12, "y of " + Describe(p) + ": off by " + std::to_string(error));
          CheckGradients(p, inputs, out);

          const Values<double> truth = Define(p, rounded);
          const std::pair<DataType, double> types[] = {
              {DataType::kFloat32, 1e-5}, {DataType::kFloat16, 4e-3}, {DataType::kBFloat16, 4e-2}};
          for (const auto& [type, allowed] : types) {
            p.dtype = type;
            const double off = Distance(Run(p, rounded, 2).y, truth);
            Expect(off < allowed, "y of " + Describe(p) + ": off by " + std::to_string(off));
          }
        }
      }
    }
  }
}

void TestThreads() {
  for (int type = 0; type < 4; ++type) {
    for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      for (int number = 0; number < 8; ++number) {
        const int gates = number / 2;
        const bool tiny = number % 2 == 1;  // so many samples that they share scratch memory
        Problem p;
        p.dtype = static_cast<DataType>(type);
        p.layout = layout;
        p.module = static_cast<Module>(gates);
        p.batch = tiny ? 150 : 3;
        p.height = tiny ? 2 : 19;
        p.width = tiny ? 1 : 23;
        p.channels = tiny ? 3 : 37;
        p.hidden = 4;
        p.batch_norm = p.module == Module::kChannelFirst;
        const Tensors<double> inputs = MakeInputs(p, 11);
        const Tensors<double> one = Run(p, inputs, 1);
        for (const int threads : {2, 4}) {
          const Tensors<double> many = Run(p, inputs, threads);
          const bool same = one.y == many.y && one.dx == many.dx && one.dw0 == many.dw0 &&
                            one.dw1 == many.dw1 && one.db0 == many.db0 && one.db1 == many.db1 &&
                            one.dkernel == many.dkernel && one.dbias == many.dbias &&
                            one.dgamma == many.dgamma;
          Expect(same, std::to_string(threads) + " threads change " + Describe(p));
        }
      }
    }
  }
}

// A NaN or an infinity stays in its sample, and is computed with as any number is: sanitizers look
// at what integer arithmetic makes of its bits.
void TestNotFinite() {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = INFINITY;
  for (int type = 0; type < 4; ++type) {
    for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      for (int gates = 0; gates < 4; ++gates) {
        Problem p;
        p.dtype = static_cast<DataType>(type);
        p.layout = layout;
        p.module = static_cast<Module>(gates);
        p.batch = 2;
        p.height = 5;
        p.width = 7;
        p.channels = 19;
        p.kernel_size = 3;
        const Tensors<double> inputs = MakeInputs(p, 5);
        const Tensors<double> clean = Run(p, inputs);
        for (const double value : {nan, -nan, infinity, -infinity}) {
          Tensors<double> spoilt = inputs;
          for (size_t i = 0; i < MapSize(p) / 2; i += 11) spoilt.x[i] = value;
          const Tensors<double> out = Run(p, spoilt);
          const auto same = [](const Values<double>& a, const Values<double>& b) {
            const auto half = static_cast<std::ptrdiff_t>(a.size() / 2);
            return std::equal(a.begin() + half, a.end(), b.begin() + half, b.end());
          };
          Expect(same(out.y, clean.y) && same(out.dx, clean.dx),
                 std::to_string(value) + " leaves its sample in " + Describe(p));
          Expect(!std::isfinite(Dot(out.y, inputs.dy)),
                 std::to_string(value) + " is lost in " + Describe(p));
        }
      }
    }
  }
}

// Helpers that never start, or start when all is over, must not be waited for.
void TestWorkSharing() {
  std::vector<std::function<void()>> late;
  cpu::WorkSharing sharing(4, [&late](std::function<void()> f) { late.push_back(std::move(f)); });
  const cpu::Parallel parallel = sharing.parallel();
  int64_t sum = 0;
  parallel.run(
      parallel.context, 10,
      [](void* argument, int64_t i) { *static_cast<int64_t*>(argument) += i; }, &sum);
  Expect(sum == 45, "the calling thread does all the work when no helper starts");
  for (const auto& helper : late) helper();
  Expect(sum == 45, "helpers that come late do nothing");
}

void TestStatuses() {
  Problem p;
  p.batch = p.height = p.width = p.channels = 1;
  const cpu::Parallel parallel;
  const auto refused = [&](const Problem& problem) {
    const Status status = cpu::Run(problem, ForwardArgs(), nullptr, parallel);
    return status.code == StatusCode::kInvalidProblem && status.message[0] != '\0' &&
           cpu::Run(problem, BackwardArgs(), nullptr, parallel).code == StatusCode::kInvalidProblem;
  };
  Problem even = p;
  even.kernel_size = 4;
  Expect(refused(even), "an even kernel is refused");
  Problem negative = p;
  negative.width = -1;
  Expect(refused(negative), "a negative size is refused");
  Problem none = p;
  none.hidden = 0;
  Expect(refused(none), "no hidden units are refused");
  Problem norm = p;
  norm.module = Module::kChannelAttention;
  norm.batch_norm = true;
  Expect(refused(norm), "a batch norm without a spatial gate is refused");
}

// Sizes whose products do not fit are refused before anything is multiplied; an empty batch takes no
// workspace, however large its samples would be, and its weights have gradients of 0.
void TestSizes() {
  constexpr int64_t k30 = int64_t{1} << 30, k31 = int64_t{1} << 31, k62 = int64_t{1} << 62;
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const cpu::Parallel parallel;
  const auto make = [](int64_t n, int64_t h, int64_t w, int64_t c) {
    Problem p;
    p.batch = n;
    p.height = h;
    p.width = w;
    p.channels = c;
    p.batch_norm = true;
    return p;
  };
  for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
    const Problem refused[] = {
        make(1, k31, k31, 2), make(2, k30, k30, 1),     make(k62, 1, 1, 1),
        make(4, k62, 1, 1),   make(1, kMost, kMost, 1), make(k31, 0, 1, k31),
        make(1, k62, 4, 0),   make(kMost, 1, 1, 0),     make(k31, k31, 0, kMost),
    };
    for (Problem p : refused) {
      p.layout = layout;
      Expect(
          cpu::WorkspaceBytes<ForwardArgs>(p, parallel) == 0 &&
              cpu::WorkspaceBytes<BackwardArgs>(p, parallel) == 0 &&
              cpu::Run(p, ForwardArgs(), nullptr, parallel).code == StatusCode::kInvalidProblem &&
              cpu::Run(p, BackwardArgs(), nullptr, parallel).code == StatusCode::kInvalidProblem,
          "refused: " + Describe(p));
    }
    const Problem empty[] = {make(0, k30, k30, 1), make(0, k62, k62, 3), make(0, kMost, 1, 2)};
    for (Problem p : empty) {
      p.layout = layout;
      Expect(cpu::WorkspaceBytes<ForwardArgs>(p, parallel) == 0 &&
                 cpu::WorkspaceBytes<BackwardArgs>(p, parallel) == 0 &&
                 cpu::WorkspaceBytes<ChannelPoolArgs>(p, parallel) == 0 &&
                 cpu::WorkspaceBytes<SpatialPoolArgs>(p, parallel) == 0,
             "no workspace for " + Describe(p));
      double statistics[2];
      const float one = 1;
      ForwardArgs forward;
      forward.gamma = &one;
      forward.batch_statistics = statistics;
      Expect(cpu::Run(p, forward, nullptr, parallel).ok(), "forward of " + Describe(p));
      float d[6][2 * 7 * 7];
      std::fill_n(&d[0][0], 6 * 2 * 7 * 7, 1.0f);
      BackwardArgs backward;
      backward.dw0 = d[0];
      backward.db0 = d[1];
      backward.dw1 = d[2];
      backward.db1 = d[3];
      backward.dkernel = d[4];
      backward.dbias = &d[5][0];
      backward.dgamma = &d[5][1];
      Expect(cpu::Run(p, backward, nullptr, parallel).ok() && d[0][0] == 0 && d[1][0] == 0 &&
                 d[2][p.channels - 1] == 0 && d[3][0] == 0 && d[4][2 * 7 * 7 - 1] == 0 &&
                 d[5][0] == 0 && d[5][1] == 0,
             "backward of " + Describe(p));
    }
  }
}

// Scratch memory is bounded by what the maps take, or is small, whatever the kernel.
void TestWorkspace() {
  struct Row {
    int64_t n, h, w, c, k;
    bool batch_norm;
  };
  const Row rows[] = {
      {200000, 1, 1, 2, 7, false}, {200000, 1, 1, 2, 31, false},  {300000, 1, 1, 2, 401, false},
      {200000, 1, 1, 2, 7, true},  {50000, 2, 2, 2, 31, true},    {20000, 4, 4, 4, 7, false},
      {4096, 7, 7, 16, 7, false},  {1000, 16, 16, 2, 31, false},  {256, 7, 7, 2048, 7, false},
      {32, 56, 56, 256, 7, false}, {8, 112, 112, 64, 7, true},    {1, 1024, 1024, 3, 7, false},
      {2, 300, 300, 2, 401, true}, {1, 1, 1000000, 2, 31, false},
  };
  cpu::Parallel parallel;
  for (const int threads : {1, 4, 16}) {
    parallel.threads = threads;
    for (const Row& row : rows) {
      for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
        Problem p;
        p.layout = layout;
        p.batch = row.n;
        p.height = row.h;
        p.width = row.w;
        p.channels = row.c;
        p.kernel_size = row.k;
        p.batch_norm = row.batch_norm;
        const auto map = static_cast<double>(4 * MapSize(p));
        for (const auto bytes : {cpu::WorkspaceBytes<ForwardArgs>(p, parallel),
                                 cpu::WorkspaceBytes<BackwardArgs>(p, parallel)}) {
          const double most = 16e6 + 12 * map;
          Expect(static_cast<double>(bytes) <= most,
                 "workspace of " + Describe(p) + " for " + std::to_string(threads) + " threads: " +
                     std::to_string(bytes) + " bytes of a map of " + std::to_string(map));
        }
      }
    }
  }
}

int RunAll() {
  TestWorkSharing();
  TestStatuses();
  TestSizes();
  TestWorkspace();
  for (const cpu::InstructionSet set :
       {cpu::InstructionSet::kBaseline, cpu::InstructionSet::kAvx2, cpu::InstructionSet::kAvx512}) {
    if (!cpu::SetInstructionSet(set)) {
      std::printf("not on this machine: %s\n", cpu::Name(set));
      continue;
    }
    TestAgainstDefinition();
    TestThreads();
    TestNotFinite();
    std::printf("tested: %s\n", cpu::Name(set));
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace
}  // namespace cbam_ops

int main() { return cbam_ops::RunAll(); }
