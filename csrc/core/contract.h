// The contract between the kernels and whoever calls them.
//
// A caller describes the problem (`Problem`), fills in raw pointers (`ForwardArgs`, ...), asks how
// much workspace a call with such arguments needs, and passes the means to run: a `Parallel` on
// CPUs (cpu/kernels.h), a stream on NVIDIA GPUs (cuda/kernels.h). The kernels allocate nothing,
// throw nothing, log nothing and never synchronise with anything but their own tasks; they return a
// `Status`. Nothing here knows TensorFlow, Eigen, pybind11 or Python.
//
// Words (see README): `x` is the feature map, N samples of P = H·W positions and C channels; of a
// volume P = D·H·W, and what is said of [H, W] holds for [D, H, W]. The
// *compute type* is float for float32, float16 and bfloat16 maps and double for float64 maps;
// weights, descriptors, gates and their gradients always have the compute type, maps (x, residual,
// y and their gradients) have `Problem::dtype`.
#ifndef CBAM_OPS_CORE_CONTRACT_H_
#define CBAM_OPS_CORE_CONTRACT_H_

#include <cstddef>
#include <cstdint>

#include "core/checked.h"

// The entry points are templates over types of this file, and no more visible than these.
#pragma GCC visibility push(default)

namespace cbam_ops {

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

constexpr DataType ComputeType(DataType map) {
  return map == DataType::kFloat64 ? DataType::kFloat64 : DataType::kFloat32;
}

// kNHWC: a sample is a row-major matrix positions x channels; kNCHW: channels x positions.
enum class Layout : int32_t { kNHWC = 0, kNCHW = 1 };

// Which channel descriptors feed the MLP.
enum class Pooling : int32_t { kAvgMax = 0, kAvg = 1, kMax = 2 };

constexpr bool UsesMean(Pooling pooling) { return pooling != Pooling::kMax; }
constexpr bool UsesMax(Pooling pooling) { return pooling != Pooling::kAvg; }

enum class Activation : int32_t { kNone = 0, kRelu = 1 };

// Where the MLP's branches, one of each descriptor, are added.
enum class MlpMerge : int32_t { kLogits = 0, kHidden = 1, kGates = 2 };

// What is computed.
enum class Module : int32_t {
  kChannelFirst = 0,      // y = u * g_s(u), u = x * g_c(x)   (CBAM)
  kParallel = 1,          // y = x * g_c(x) * g_s(x)
  kChannelAttention = 2,  // y = x * g_c(x)
  kSpatialAttention = 3,  // y = x * g_s(x)
  kChannelPool = 4,       // mean and max of x over positions
  kSpatialPool = 5,       // mean and max of x over channels
};

constexpr bool HasChannelGate(Module module) { return module <= Module::kChannelAttention; }
constexpr bool HasSpatialGate(Module module) {
  return module <= Module::kParallel || module == Module::kSpatialAttention;
}

// Sizes are elements; a size may be 0 (an empty batch is legal, so are empty positions or
// channels).
struct Problem {
  DataType dtype = DataType::kFloat32;
  Layout layout = Layout::kNHWC;
  Module module = Module::kChannelFirst;
  int64_t batch = 0;
  int64_t depth = 1;  // of volumes
  int64_t height = 0;
  int64_t width = 0;
  int64_t channels = 0;

  // The channel gate, of the pooled descriptors t with h_t = relu(t.W0 + b0): by `mlp_merge`
  // sigmoid(sum f(h_t.W1 + b1)), sigmoid(f((sum h_t).W1 + b1)) or sum sigmoid(f(h_t.W1 + b1)).
  int64_t hidden = 1;
  Pooling pooling = Pooling::kAvgMax;
  Activation mlp_activation = Activation::kNone;  // f
  MlpMerge mlp_merge = MlpMerge::kLogits;

  // The spatial gate: sigmoid(z), z = conv(descriptors) + bias, zero padding, odd kernel sizes.
  // With batch_norm, z is normalised by its own mean and (biased) variance over batch and
  // positions: z = gamma * (conv - mean) / sqrt(variance + epsilon) + bias.
  int64_t kernel_depth = 1;
  int64_t kernel_height = 7;
  int64_t kernel_width = 7;
  bool batch_norm = false;
  double epsilon = 1e-5;

  // y = activation(gated x + residual), no sigmoid; the residual is there when its pointer is.
  Activation activation = Activation::kNone;
};

inline bool HasChannelGate(const Problem& problem) { return HasChannelGate(problem.module); }
inline bool HasSpatialGate(const Problem& problem) { return HasSpatialGate(problem.module); }

// Whether each branch of the MLP has logits and a gradient of its own. Else there is one logit, of
// the sum of the hidden units or of the only branch.
inline bool HasTwoLogits(const Problem& problem) {
  return problem.pooling == Pooling::kAvgMax && problem.mlp_merge != MlpMerge::kHidden &&
         (problem.mlp_merge == MlpMerge::kGates || problem.mlp_activation != Activation::kNone);
}
inline bool AddsHidden(const Problem& problem) {
  return problem.pooling == Pooling::kAvgMax && !HasTwoLogits(problem);
}
// Whether that one logit stands for the sum of two, and has b1 twice.
inline bool IsSumOfLogits(const Problem& problem) {
  return AddsHidden(problem) && problem.mlp_merge == MlpMerge::kLogits;
}

// What workspaces are aligned to, on CPUs and on GPUs.
inline constexpr size_t kHostAlignment = 64;
inline constexpr size_t kCudaAlignment = 256;

// Optional pointers are marked; the others are required when the problem has the gate they belong
// to, and ignored when not.
struct ForwardArgs {
  const void* x = nullptr;         // [N, H, W, C] or [N, C, H, W]
  const void* residual = nullptr;  // optional, like x
  const void* w0 = nullptr;        // [C, hidden]
  const void* b0 = nullptr;        // [hidden], optional
  const void* w1 = nullptr;        // [hidden, C]
  const void* b1 = nullptr;        // [C], optional
  const void* kernel = nullptr;    // [kernel_depth, kernel_height, kernel_width, 2]: mean, max
  const void* bias = nullptr;      // [1], optional
  const void* gamma = nullptr;     // [1], with batch_norm

  void* y = nullptr;  // like x; on CPUs it may be x or the residual
  void* channel_descriptors =
      nullptr;  // [2, N, C]: mean, max over positions (a descriptor that `pooling` leaves out is 0)
  void* channel_gate = nullptr;         // [N, C]
  void* spatial_descriptors = nullptr;  // [N, 2, H, W]: mean, max over channels, for both layouts
  void* spatial_gate = nullptr;         // [N, H, W]
  void* batch_statistics =
      nullptr;  // [2]: mean, biased variance of conv over batch and positions; with batch_norm
};

struct BackwardArgs {
  const void* x = nullptr;
  const void* dy = nullptr;
  const void* y = nullptr;  // with activation == kRelu
  const void* w0 = nullptr;
  const void* b0 = nullptr;  // optional
  const void* w1 = nullptr;
  const void* b1 = nullptr;  // optional
  const void* kernel = nullptr;
  const void* bias = nullptr;   // optional; of the forward pass, by which logits are found again
  const void* gamma = nullptr;  // with batch_norm
  // What the forward pass wrote.
  const void* channel_descriptors = nullptr;
  const void* channel_gate = nullptr;
  const void* spatial_descriptors = nullptr;
  const void* spatial_gate = nullptr;
  const void* batch_statistics = nullptr;  // with batch_norm
  // Gradients that reach the gates by other ways than y; optional.
  const void* d_channel_gate = nullptr;
  const void* d_spatial_gate = nullptr;

  void* dx = nullptr;  // on CPUs it may be dy or y, as may d_residual, but not both the same
  // Only with activation == kRelu and a residual; without an activation the residual's gradient is
  // dy itself. Optional.
  void* d_residual = nullptr;
  void* dw0 = nullptr;
  void* db0 = nullptr;
  void* dw1 = nullptr;
  void* db1 = nullptr;
  void* dkernel = nullptr;
  void* dbias = nullptr;
  void* dgamma = nullptr;  // with batch_norm
};

// The pools on their own. Outputs have the map's type. Only module, dtype, layout and the four
// sizes of the problem are read.
struct ChannelPoolArgs {
  const void* x = nullptr;
  void* mean = nullptr;     // [N, C]
  void* maximum = nullptr;  // [N, C]
};
struct ChannelPoolGradArgs {
  const void* x = nullptr;
  const void* maximum = nullptr;    // [N, C], what the forward pass wrote
  const void* d_mean = nullptr;     // [N, C]
  const void* d_maximum = nullptr;  // [N, C]
  void* dx = nullptr;
};
struct SpatialPoolArgs {
  const void* x = nullptr;
  void* descriptors =
      nullptr;  // [N, H, W, 2] (NHWC) or [N, 2, H, W] (NCHW): mean, max over channels
};
struct SpatialPoolGradArgs {
  const void* x = nullptr;
  const void* descriptors = nullptr;    // what the forward pass wrote
  const void* d_descriptors = nullptr;  // like descriptors
  void* dx = nullptr;
};

// What is written once per struct.
#define CBAM_OPS_FOR_EACH_ARGS(DO) \
  DO(ForwardArgs)                  \
  DO(BackwardArgs)                 \
  DO(ChannelPoolArgs)              \
  DO(ChannelPoolGradArgs)          \
  DO(SpatialPoolArgs)              \
  DO(SpatialPoolGradArgs)

enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidProblem = 1,  // a size or option the kernels cannot take; `message` says which
  kDeviceError = 2,     // a launch failed; `kernel` and `message` say which and why
  kUnsupported = 3,     // this build or this device has no kernel for the problem
};

// Strings are static: a status owns nothing.
struct Status {
  StatusCode code = StatusCode::kOk;
  const char* message = "";
  const char* kernel = "";
  bool ok() const { return code == StatusCode::kOk; }
};

// The checks that every implementation makes first.
inline Status CheckProblem(const Problem& problem) {
  const auto invalid = [](const char* message) {
    return Status{StatusCode::kInvalidProblem, message, ""};
  };
  if (problem.batch < 0 || problem.depth < 0 || problem.height < 0 || problem.width < 0 ||
      problem.channels < 0) {
    return invalid("batch, depth, height, width and channels must not be negative");
  }
  if (HasChannelGate(problem) && problem.hidden < 1) return invalid("hidden must be at least 1");
  const auto odd = [](int64_t size) { return size > 0 && size % 2 == 1; };
  if (HasSpatialGate(problem) &&
      !(odd(problem.kernel_depth) && odd(problem.kernel_height) && odd(problem.kernel_width))) {
    return invalid("kernel_depth, kernel_height and kernel_width must be odd and positive");
  }
  if (problem.batch_norm && !HasSpatialGate(problem))
    return invalid("batch_norm needs a spatial gate");
  // More than any machine has, and few enough that no offset or count of bytes overflows.
  const auto too_many = [](CheckedSize elements) { return elements.value() > int64_t{1} << 52; };
  const CheckedSize batch = problem.batch, channels = problem.channels;
  const CheckedSize positions = batch * problem.depth * problem.height * problem.width;
  if (too_many(positions * channels) || too_many(positions * 2) || too_many(batch * channels * 2)) {
    return invalid(
        "batch * depth * height * width * channels and each product of less must be at most 2^52");
  }
  if (HasChannelGate(problem) &&
      (too_many(batch * problem.hidden * 2) || too_many(channels * problem.hidden))) {
    return invalid("batch * hidden and channels * hidden must be at most 2^52");
  }
  if (HasSpatialGate(problem) &&
      too_many(CheckedSize(problem.kernel_depth) * problem.kernel_height * problem.kernel_width)) {
    return invalid("kernel_depth * kernel_height * kernel_width must be at most 2^52");
  }
  return {};
}

}  // namespace cbam_ops

#pragma GCC visibility pop

#endif  // CBAM_OPS_CORE_CONTRACT_H_
