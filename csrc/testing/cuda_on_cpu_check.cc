// Runs the emulated float32 kernels over a list of problems on exactly sized heap blocks, for
// AddressSanitizer and ThreadSanitizer, and holds them against the definition (definition.h), so
// that a fault in the sources is noticed with no sanitizer too. "quick" as first argument takes a
// shorter list; "threads" runs that one for all gates and compares nothing.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/cuda/kernels.h"
#include "testing/cuda_on_cpu.h"
#include "testing/definition.h"

namespace {

using cbam_ops::Activation;
using cbam_ops::Layout;
using cbam_ops::Module;
using cbam_ops::Problem;
using cbam_ops::Status;
namespace cuda = cbam_ops::cuda;

int failures = 0;
bool compare = true;

// A heap block of exactly `count` floats, aligned as allocators of device memory align, full of
// NaN.
struct Buffer {
  explicit Buffer(int64_t count_) : count(count_) {
    void* memory = nullptr;
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    if (posix_memalign(&memory, 256, std::max<size_t>(bytes, 1)) != 0) std::abort();
    data = static_cast<float*>(memory);
    std::memset(memory, 0xff, bytes);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data;
  int64_t count;
};
using Pointer = std::unique_ptr<Buffer>;

struct Shape {
  int64_t n, h, w, c, hidden, k;
};

class Check {
 public:
  Check(const Shape& shape, Layout layout, Module gates, Activation activation, bool batch_norm)
      : s(shape), random(7) {
    problem.layout = layout;
    problem.module = gates;
    problem.activation = activation;
    problem.batch_norm = batch_norm;
    problem.batch = s.n;
    problem.height = s.h;
    problem.width = s.w;
    problem.channels = s.c;
    problem.hidden = s.hidden;
    problem.kernel_size = s.k;
    positions = s.h * s.w;
    x = Random(s.n * positions * s.c, true);
    dy = Random(s.n * positions * s.c, true);
    residual = Random(s.n * positions * s.c, true);
    w0 = Random(s.c * s.hidden, false);
    b0 = Random(s.hidden, false);
    w1 = Random(s.hidden * s.c, false);
    b1 = Random(s.c, false);
    kernel = Random(s.k * s.k * 2, false);
    bias = Random(1, false);
    gamma = Random(1, false);
  }

  void Run(const char* label) {
    const auto made = [](int64_t count) { return std::make_unique<Buffer>(count); };
    const int64_t map = s.n * positions * s.c;
    Pointer y = made(map), descriptors = made(2 * s.n * s.c), channel_gate = made(s.n * s.c);
    Pointer planes = made(s.n * 2 * positions), spatial_gate = made(s.n * positions),
            statistics = made(2);
    Pointer forward_space = made(
        static_cast<int64_t>(cuda::WorkspaceBytes<cbam_ops::ForwardArgs>(problem) / sizeof(float)));
    cbam_ops::ForwardArgs args;
    args.x = x->data;
    args.residual = residual->data;
    args.w0 = w0->data;
    args.b0 = b0->data;
    args.w1 = w1->data;
    args.b1 = b1->data;
    args.kernel = kernel->data;
    args.bias = bias->data;
    args.gamma = gamma->data;
    args.y = y->data;
    args.channel_descriptors = descriptors->data;
    args.channel_gate = channel_gate->data;
    args.spatial_descriptors = planes->data;
    args.spatial_gate = spatial_gate->data;
    args.batch_statistics = statistics->data;
    Expect(cuda::Run(problem, args, forward_space->data, nullptr), label);

    Pointer dx = made(map), d_residual = made(map), dw0 = made(s.c * s.hidden),
            db0 = made(s.hidden);
    Pointer dw1 = made(s.hidden * s.c), db1 = made(s.c), dkernel = made(s.k * s.k * 2),
            dbias = made(1), dgamma = made(1);
    Pointer space = made(static_cast<int64_t>(
        cuda::WorkspaceBytes<cbam_ops::BackwardArgs>(problem) / sizeof(float)));
    cbam_ops::BackwardArgs back;
    back.x = x->data;
    back.dy = dy->data;
    back.y = y->data;
    back.w0 = w0->data;
    back.b0 = b0->data;
    back.w1 = w1->data;
    back.b1 = b1->data;
    back.kernel = kernel->data;
    back.bias = bias->data;
    back.gamma = gamma->data;
    back.channel_descriptors = descriptors->data;
    back.channel_gate = channel_gate->data;
    back.spatial_descriptors = planes->data;
    back.spatial_gate = spatial_gate->data;
    back.batch_statistics = statistics->data;
    back.dx = dx->data;
    back.d_residual = problem.activation == Activation::kRelu ? d_residual->data : nullptr;
    back.dw0 = dw0->data;
    back.db0 = db0->data;
    back.dw1 = dw1->data;
    back.db1 = db1->data;
    back.dkernel = dkernel->data;
    back.dbias = dbias->data;
    back.dgamma = dgamma->data;
    Expect(cuda::Run(problem, back, space->data, nullptr), label);
    if (!compare) return;

    // The gradients as differences of the plain evaluation, along the direction of each input. (The
    // maximum's ties make the function kinked in x: there along a direction that keeps equal what
    // is equal, by scaling.)
    const double base = Evaluate(y->data, label);
    const auto slope = [&](Buffer* input, const Buffer* gradient, const char* name) {
      double expected = 0, scale = 1e-2;
      for (int64_t i = 0; i < input->count; ++i) {
        expected += static_cast<double>(gradient->data[i]) * input->data[i];
        scale += std::fabs(static_cast<double>(gradient->data[i]) * input->data[i]);
      }
      const std::vector<float> saved(input->data, input->data + input->count);
      factor = 1.0 + 1e-5;
      scaled = input;
      const double up = Evaluate(nullptr, label);
      factor = 1.0 - 1e-5;
      const double down = Evaluate(nullptr, label);
      scaled = nullptr;
      const double measured = (up - down) / 2e-5;
      if (!(std::fabs(measured - expected) <= 2e-3 * scale)) {
        std::printf("%s: %s: slope %g, differences say %g (loss %g)\n", label, name, expected,
                    measured, base);
        ++failures;
      }
    };
    const bool channel = HasChannelGate(problem), spatial = HasSpatialGate(problem);
    // With a ReLU at the end the loss is kinked where y is 0: exact zeros aside, smooth for these
    // inputs.
    slope(x.get(), dx.get(), "dx");
    if (channel) {
      slope(w0.get(), dw0.get(), "dw0");
      slope(b0.get(), db0.get(), "db0");
      slope(w1.get(), dw1.get(), "dw1");
      slope(b1.get(), db1.get(), "db1");
    }
    if (spatial) {
      slope(kernel.get(), dkernel.get(), "dkernel");
      slope(bias.get(), dbias.get(), "dbias");
      if (problem.batch_norm) slope(gamma.get(), dgamma.get(), "dgamma");
    }
    // What scaling does not see: dx must also have the right pattern; its sum over a sample against
    // a shift of x.
    double shift_expected = 0, shift_scale = 1e-2;
    for (int64_t i = 0; i < dx->count; ++i) {
      shift_expected += dx->data[i];
      shift_scale += std::fabs(dx->data[i]);
    }
    shift = 1e-5;
    const double up = Evaluate(nullptr, label);
    shift = -1e-5;
    const double down = Evaluate(nullptr, label);
    shift = 0;
    if (!(std::fabs((up - down) / 2e-5 - shift_expected) <= 2e-3 * shift_scale)) {
      std::printf("%s: dx: shift %g, differences say %g\n", label, shift_expected,
                  (up - down) / 2e-5);
      ++failures;
    }
  }

 private:
  Pointer Random(int64_t count, bool steps) {
    auto buffer = std::make_unique<Buffer>(count);
    std::normal_distribution<float> normal(0.0f, steps ? 1.0f : 0.5f);
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(random);
      buffer->data[i] = steps ? std::nearbyint(value * 8) / 8 + 0.03f : value;
    }
    return buffer;
  }
  void Expect(const Status& status, const char* label) {
    if (status.ok()) return;
    std::printf("%s: %s: %s\n", label, status.kernel, status.message);
    ++failures;
  }
  double Value(const Buffer* buffer, int64_t i) const {
    double value = buffer->data[i];
    if (buffer == scaled) value *= factor;
    if (buffer == x.get()) value += shift;
    return value;
  }

  // sum of dy * y of the definition; compares y with `got` where given.
  double Evaluate(const float* got, const char* label) const {
    const auto values = [this](const Pointer& buffer) {
      std::vector<cbam_ops::Number> result;
      for (int64_t i = 0; i < buffer->count; ++i) result.emplace_back(Value(buffer.get(), i));
      return result;
    };
    const cbam_ops::Numbers inputs = {{"x", values(x)},           {"residual", values(residual)},
                                      {"w0", values(w0)},         {"b0", values(b0)},
                                      {"w1", values(w1)},         {"b1", values(b1)},
                                      {"kernel", values(kernel)}, {"bias", values(bias)},
                                      {"gamma", values(gamma)}};
    const cbam_ops::Definition definition(problem, inputs);
    std::vector<double> y;
    for (const cbam_ops::Number& v : definition.outputs().at("y")) y.push_back(v.value);
    double loss = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      loss += y[i] * dy->data[i];
      if (got != nullptr && !(std::fabs(y[i] - got[i]) <= 2e-5 * (1 + std::fabs(y[i])))) {
        std::printf("%s: y[%zu] is %g, not %g\n", label, i, static_cast<double>(got[i]), y[i]);
        ++failures;
        return loss;
      }
    }
    return loss;
  }

  Shape s;
  int64_t positions;
  Problem problem;
  std::mt19937 random;
  Pointer x, dy, residual, w0, b0, w1, b1, kernel, bias, gamma;
  const Buffer* scaled = nullptr;
  double factor = 1, shift = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool quick = mode == "quick" || mode == "threads";
  compare = mode != "threads";
  // A deadlock or an illegal copy is reported, and counts.
  cbam_ops::cuda_on_cpu::SetFailureHandler([](const char* message) {
    std::printf("%s\n", message);
    std::fflush(stdout);
    std::_Exit(2);
  });
  auto& device = cbam_ops::cuda_on_cpu::PretendedDevice();
  device.l2_bytes = 3 * 4 * 5 * 8 * 8 * 4 * 2;  // a few samples in flight
  struct Problems {
    Shape shape;
    bool cluster;
  };
  std::vector<Problems> problems = {
      {{3, 5, 8, 8, 3, 3}, false}, {{2, 5, 8, 36, 5, 5}, false}, {{5, 5, 8, 32, 9, 5}, true}};
  if (!quick) {
    problems.push_back({{2, 3, 7, 5, 2, 3}, false});
    problems.push_back({{1, 14, 12, 40, 4, 7}, false});
    problems.push_back({{1, 2, 140, 8, 2, 3}, false});
    problems.push_back({{2, 8, 12, 16, 3, 7}, true});
  }
  const int schedules = mode == "quick" ? 2 : 1;
  for (const Problems& one : problems) {
    for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      for (const Module gates : {Module::kChannelFirst, Module::kParallel,
                                 Module::kChannelAttention, Module::kSpatialAttention}) {
        for (const bool batch_norm : {false, true}) {
          if (batch_norm && (gates != Module::kChannelFirst || one.cluster)) continue;
          if (mode == "quick" && gates != Module::kChannelFirst) continue;
          for (int schedule = 0; schedule < schedules; ++schedule) {
            cuda::SetPath(one.cluster ? cuda::Path::kCluster : cuda::Path::kPortable);
            device.shared_bytes =
                one.cluster && one.shape.n > 4 ? 24000 : 232448;  // several blocks to a sample
            cbam_ops::cuda_on_cpu::SetSchedule(static_cast<uint64_t>(schedule) * 3 +
                                               (quick ? 1 : 5));
            const Activation activation = gates == Module::kChannelFirst && !batch_norm
                                              ? Activation::kRelu
                                              : Activation::kNone;
            const std::string label =
                std::to_string(one.shape.h) + "x" + std::to_string(one.shape.w) + "x" +
                std::to_string(one.shape.c) + (layout == Layout::kNHWC ? " NHWC" : " NCHW") +
                " gates " + std::to_string(static_cast<int>(gates)) +
                (batch_norm ? " batch norm" : "") + (one.cluster ? " cluster" : " portable");
            Check(one.shape, layout, gates, activation, batch_norm).Run(label.c_str());
          }
        }
      }
    }
  }
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0 ? 1 : 0;
}
