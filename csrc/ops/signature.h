// What every op takes and gives, written down once: names, types, dimensions, options, and where
// each argument goes in the core's structs.
//
// From this table come TensorFlow's op definitions, shape functions and kernels (tf/), the lowering
// and the handlers of XLA (tf/xla/) and the functions of the Python module (python/). An op is
// listed in AllOps and nowhere else. Nothing here knows a framework.
//
// An argument that belongs to one of the gates is left out of the ops that lack that gate, so the
// whole module and its two halves share their rows.
#ifndef CBAM_OPS_OPS_SIGNATURE_H_
#define CBAM_OPS_OPS_SIGNATURE_H_

#include <cstddef>
#include <cstdint>

#include "core/contract.h"

namespace cbam_ops {
namespace ops {

// Rows of a table.
template <typename T>
class Rows {
 public:
  template <size_t kSize>
  constexpr Rows(const T (&rows)[kSize]) : begin_(rows), end_(rows + kSize) {}  // NOLINT: implicit
  constexpr const T* begin() const { return begin_; }
  constexpr const T* end() const { return end_; }

 private:
  const T* begin_;
  const T* end_;
};

// --- Arguments ---

// The names of dimensions. kHidden is the MLP's width, kKernelDepth, kKernelHeight and kKernelWidth
// are the convolution's; kStatistics is 2 with batch norm and 0 without.
enum class Dim : int8_t {
  kBatch,
  kDepth,
  kHeight,
  kWidth,
  kChannels,
  kHidden,
  kKernelDepth,
  kKernelHeight,
  kKernelWidth,
  kStatistics,
  kOne,
  kTwo,
};
inline constexpr int kBoundDims = 9;  // the dimensions whose size comes from the arguments
inline constexpr int kMaxRank = 5;

// The dimensions of an argument. Those of a map are written in the order of NHWC and permuted where
// the layout says so. Depth and the kernel's are those of volumes: images lack them.
struct Dims {
  int rank;
  Dim dims[kMaxRank];
  bool is_map = false;
};
inline constexpr Dims kMap = {
    5, {Dim::kBatch, Dim::kDepth, Dim::kHeight, Dim::kWidth, Dim::kChannels}, /*is_map=*/true};
inline constexpr Dims kPooledMap = {
    5, {Dim::kBatch, Dim::kDepth, Dim::kHeight, Dim::kWidth, Dim::kTwo}, /*is_map=*/true};
inline constexpr Dims kPerChannel = {2, {Dim::kBatch, Dim::kChannels}};
inline constexpr Dims kPerPosition = {4, {Dim::kBatch, Dim::kDepth, Dim::kHeight, Dim::kWidth}};
inline constexpr Dims kChannelDescriptors = {3, {Dim::kTwo, Dim::kBatch, Dim::kChannels}};
inline constexpr Dims kSpatialDescriptors = {
    5, {Dim::kBatch, Dim::kTwo, Dim::kDepth, Dim::kHeight, Dim::kWidth}};
inline constexpr Dims kStatistics = {1, {Dim::kStatistics}};
inline constexpr Dims kW0 = {2, {Dim::kChannels, Dim::kHidden}};
inline constexpr Dims kB0 = {1, {Dim::kHidden}};
inline constexpr Dims kW1 = {2, {Dim::kHidden, Dim::kChannels}};
inline constexpr Dims kB1 = {1, {Dim::kChannels}};
inline constexpr Dims kConvolution = {
    5, {Dim::kKernelDepth, Dim::kKernelHeight, Dim::kKernelWidth, Dim::kTwo, Dim::kOne}};
inline constexpr Dims kScalar = {1, {Dim::kOne}};

// kMapType: the type of the feature map (T); kComputeType: ComputeType of it (U).
enum class ArgumentType : int8_t { kMapType, kComputeType };

// The gate that an argument belongs to.
enum class Gate : int8_t { kNone, kChannel, kSpatial };

// When an argument is there. Beyond the first two it is a list of no or one tensor.
enum class Presence : int8_t {
  kAlways,
  kNullable,          // an op always has it, the kernels also take null for it
  kWithBatchNorm,     // as the problem says
  kWithActivation,    // likewise
  kResidual,          // as the caller likes
  kResidualGradient,  // as the caller likes, but only with an activation: else it is dy
};

// The attribute with the number of tensors in the list; null where there is no list.
constexpr const char* CountAttribute(Presence presence) {
  switch (presence) {
    case Presence::kWithBatchNorm:
      return "num_gamma";
    case Presence::kWithActivation:
      return "num_y";
    case Presence::kResidual:
      return "num_residual";
    case Presence::kResidualGradient:
      return "num_d_residual";
    case Presence::kAlways:
    case Presence::kNullable:
      break;
  }
  return nullptr;
}

struct Argument {
  const char* name;
  ArgumentType type;
  Dims dims;
  Gate gate = Gate::kNone;
  Presence presence = Presence::kAlways;
};

constexpr bool Has(Module module, Gate gate) {
  return gate == Gate::kNone ||
         (gate == Gate::kChannel ? HasChannelGate(module) : HasSpatialGate(module));
}
constexpr DataType TypeOf(const Argument& argument, DataType map) {
  return argument.type == ArgumentType::kMapType ? map : ComputeType(map);
}

// `pointer` is the member of the core's struct, or null for what the kernels do not read.
template <typename Args>
struct Input {
  Argument argument;
  const void* Args::* pointer;
};
// `takes_over` names the inputs in whose memory the CPU kernels may be told to write an output.
inline constexpr int kMostTakenOver = 2;
template <typename Args>
struct Output {
  Argument argument;
  void* Args::* pointer;
  const char* takes_over[kMostTakenOver] = {};
};

namespace internal {

constexpr auto kT = ArgumentType::kMapType;
constexpr auto kU = ArgumentType::kComputeType;
constexpr auto kNone = Gate::kNone;
constexpr auto kChannel = Gate::kChannel;
constexpr auto kSpatial = Gate::kSpatial;
constexpr auto kNullable = Presence::kNullable;
constexpr auto kWithBatchNorm = Presence::kWithBatchNorm;

using F = ForwardArgs;
using B = BackwardArgs;
using CP = ChannelPoolArgs;
using CPG = ChannelPoolGradArgs;
using SP = SpatialPoolArgs;
using SPG = SpatialPoolGradArgs;

inline constexpr Input<F> kForwardInputs[] = {
    {{"x", kT, kMap}, &F::x},
    {{"w0", kU, kW0, kChannel}, &F::w0},
    {{"b0", kU, kB0, kChannel, kNullable}, &F::b0},
    {{"w1", kU, kW1, kChannel}, &F::w1},
    {{"b1", kU, kB1, kChannel, kNullable}, &F::b1},
    {{"kernel", kU, kConvolution, kSpatial}, &F::kernel},
    {{"bias", kU, kScalar, kSpatial, kNullable}, &F::bias},
    {{"gamma", kU, kScalar, kSpatial, kWithBatchNorm}, &F::gamma},
    {{"residual", kT, kMap, kNone, Presence::kResidual}, &F::residual},
};
inline constexpr Output<F> kForwardOutputs[] = {
    {{"y", kT, kMap}, &F::y, {"x", "residual"}},
    {{"channel_gate", kU, kPerChannel, kChannel}, &F::channel_gate},
    {{"spatial_gate", kU, kPerPosition, kSpatial}, &F::spatial_gate},
    {{"channel_descriptors", kU, kChannelDescriptors, kChannel}, &F::channel_descriptors},
    {{"spatial_descriptors", kU, kSpatialDescriptors, kSpatial}, &F::spatial_descriptors},
    {{"batch_statistics", kU, kStatistics, kSpatial}, &F::batch_statistics},
};

inline constexpr Input<B> kBackwardInputs[] = {
    {{"x", kT, kMap}, &B::x},
    {{"dy", kT, kMap}, &B::dy},
    {{"y", kT, kMap, kNone, Presence::kWithActivation}, &B::y},
    {{"w0", kU, kW0, kChannel}, &B::w0},
    {{"b0", kU, kB0, kChannel, kNullable}, &B::b0},
    {{"w1", kU, kW1, kChannel}, &B::w1},
    {{"b1", kU, kB1, kChannel, kNullable}, &B::b1},
    {{"kernel", kU, kConvolution, kSpatial}, &B::kernel},
    {{"bias", kU, kScalar, kSpatial, kNullable}, &B::bias},
    {{"gamma", kU, kScalar, kSpatial, kWithBatchNorm}, &B::gamma},
    {{"channel_gate", kU, kPerChannel, kChannel}, &B::channel_gate},
    {{"spatial_gate", kU, kPerPosition, kSpatial}, &B::spatial_gate},
    {{"channel_descriptors", kU, kChannelDescriptors, kChannel}, &B::channel_descriptors},
    {{"spatial_descriptors", kU, kSpatialDescriptors, kSpatial}, &B::spatial_descriptors},
    {{"batch_statistics", kU, kStatistics, kSpatial}, &B::batch_statistics},
    {{"d_channel_gate", kU, kPerChannel, kChannel, kNullable}, &B::d_channel_gate},
    {{"d_spatial_gate", kU, kPerPosition, kSpatial, kNullable}, &B::d_spatial_gate},
};
inline constexpr Output<B> kBackwardOutputs[] = {
    {{"dx", kT, kMap}, &B::dx, {"dy", "y"}},
    {{"dw0", kU, kW0, kChannel}, &B::dw0},
    {{"db0", kU, kB0, kChannel}, &B::db0},
    {{"dw1", kU, kW1, kChannel}, &B::dw1},
    {{"db1", kU, kB1, kChannel}, &B::db1},
    {{"dkernel", kU, kConvolution, kSpatial}, &B::dkernel},
    {{"dbias", kU, kScalar, kSpatial}, &B::dbias},
    {{"dgamma", kU, kScalar, kSpatial, kWithBatchNorm}, &B::dgamma},
    {{"d_residual", kT, kMap, kNone, Presence::kResidualGradient}, &B::d_residual, {"dy", "y"}},
};

inline constexpr Input<CP> kChannelPoolInputs[] = {{{"x", kT, kMap}, &CP::x}};
inline constexpr Output<CP> kChannelPoolOutputs[] = {
    {{"mean", kT, kPerChannel}, &CP::mean},
    {{"maximum", kT, kPerChannel}, &CP::maximum},
};
inline constexpr Input<CPG> kChannelPoolGradInputs[] = {
    {{"x", kT, kMap}, &CPG::x},
    {{"maximum", kT, kPerChannel}, &CPG::maximum},
    {{"d_mean", kT, kPerChannel}, &CPG::d_mean},
    {{"d_maximum", kT, kPerChannel}, &CPG::d_maximum},
};
inline constexpr Output<CPG> kChannelPoolGradOutputs[] = {{{"dx", kT, kMap}, &CPG::dx}};

inline constexpr Input<SP> kSpatialPoolInputs[] = {{{"x", kT, kMap}, &SP::x}};
inline constexpr Output<SP> kSpatialPoolOutputs[] = {
    {{"descriptors", kT, kPooledMap}, &SP::descriptors}};
inline constexpr Input<SPG> kSpatialPoolGradInputs[] = {
    {{"x", kT, kMap}, &SPG::x},
    {{"descriptors", kT, kPooledMap}, &SPG::descriptors},
    {{"d_descriptors", kT, kPooledMap}, &SPG::d_descriptors},
};
inline constexpr Output<SPG> kSpatialPoolGradOutputs[] = {{{"dx", kT, kMap}, &SPG::dx}};

}  // namespace internal

// --- Options ---

// An option in words, in the order of the enumerators they stand for; the first is the default.
struct Choice {
  const char* name;
  Rows<const char*> words;
  bool (*is_of)(Module module);  // which ops have it
  void (*set)(int word, Problem* problem);
};

namespace internal {
inline constexpr const char* kLayouts[] = {"NHWC", "NCHW"};
inline constexpr const char* kActivations[] = {"none", "relu"};
inline constexpr const char* kMerges[] = {"logits", "hidden", "gates"};
inline constexpr const char* kPoolings[] = {"avg+max", "avg", "max"};
inline constexpr const char* kOrders[] = {"channel_first", "parallel"};
}  // namespace internal

inline constexpr Choice kChoices[] = {
    {"data_format", internal::kLayouts, [](Module) { return true; },
     [](int word, Problem* problem) { problem->layout = static_cast<Layout>(word); }},
    {"mlp_activation", internal::kActivations, [](Module module) { return HasChannelGate(module); },
     [](int word, Problem* problem) { problem->mlp_activation = static_cast<Activation>(word); }},
    {"pooling", internal::kPoolings,
     [](Module module) { return module == Module::kChannelAttention; },
     [](int word, Problem* problem) { problem->pooling = static_cast<Pooling>(word); }},
    {"order", internal::kOrders, [](Module module) { return module == Module::kChannelFirst; },
     [](int word, Problem* problem) { problem->module = static_cast<Module>(word); }},
    {"activation", internal::kActivations,
     [](Module module) { return HasChannelGate(module) || HasSpatialGate(module); },
     [](int word, Problem* problem) { problem->activation = static_cast<Activation>(word); }},
    {"mlp_merge", internal::kMerges, [](Module module) { return HasChannelGate(module); },
     [](int word, Problem* problem) { problem->mlp_merge = static_cast<MlpMerge>(word); }},
};

// The option that is a number, of the ops with a spatial gate. Its default is Problem's, and every
// caller of ours passes it. The definition of TensorFlow's ops keeps an older default: a saved
// graph leaves out what equals the default and takes it from the definition when it is loaded.
inline constexpr const char* kEpsilon = "epsilon";
inline constexpr const char* kEpsilonOfSavedGraphs = "0.001";

// --- Ops ---

// `module` is kChannelFirst where an option of the op chooses between that and kParallel.
template <typename CoreArgs>
struct Signature {
  using Args = CoreArgs;
  const char* op;
  Module module;
  Rows<Input<Args>> inputs;
  Rows<Output<Args>> outputs;
  const char* doc;
};

// Calls body(argument) for the inputs of an op, then for its outputs.
template <typename Args, typename Body>
constexpr void ForEachArgument(const Signature<Args>& signature, const Body& body) {
  for (const auto& input : signature.inputs) {
    if (Has(signature.module, input.argument.gate)) body(input.argument);
  }
  for (const auto& output : signature.outputs) {
    if (Has(signature.module, output.argument.gate)) body(output.argument);
  }
}

// Whether an op has arguments of the compute type.
template <typename Args>
constexpr bool UsesComputeType(const Signature<Args>& signature) {
  bool uses = false;
  ForEachArgument(signature, [&uses](const Argument& argument) {
    uses = uses || argument.type == ArgumentType::kComputeType;
  });
  return uses;
}

inline constexpr Signature<ForwardArgs> kCbam = {
    "CbamOps>Cbam", Module::kChannelFirst, internal::kForwardInputs, internal::kForwardOutputs, R"(
The convolutional block attention module (Woo et al., 2018) in one pass over memory.

u = x * channel_gate(x); y = activation(u * spatial_gate(u) + residual), or with order='parallel'
y = activation(x * channel_gate(x) * spatial_gate(x) + residual). With `gamma` the convolution of the
spatial gate is normalised by its own mean and variance over the batch and all positions, and `bias`
is the offset (the training form of batch norm). The outputs after `spatial_gate` are what the
gradient needs.)"};
inline constexpr Signature<BackwardArgs> kCbamGrad = {
    "CbamOps>CbamGrad", Module::kChannelFirst, internal::kBackwardInputs,
    internal::kBackwardOutputs, "The gradient of CbamOps>Cbam."};
inline constexpr Signature<ForwardArgs> kChannelAttention = {
    "CbamOps>ChannelAttention", Module::kChannelAttention, internal::kForwardInputs,
    internal::kForwardOutputs, "y = activation(x * channel_gate(x) + residual)."};
inline constexpr Signature<BackwardArgs> kChannelAttentionGrad = {
    "CbamOps>ChannelAttentionGrad", Module::kChannelAttention, internal::kBackwardInputs,
    internal::kBackwardOutputs, "The gradient of CbamOps>ChannelAttention."};
inline constexpr Signature<ForwardArgs> kSpatialAttention = {
    "CbamOps>SpatialAttention", Module::kSpatialAttention, internal::kForwardInputs,
    internal::kForwardOutputs,
    "y = activation(x * spatial_gate(x) + residual); `gamma` as in CbamOps>Cbam."};
inline constexpr Signature<BackwardArgs> kSpatialAttentionGrad = {
    "CbamOps>SpatialAttentionGrad", Module::kSpatialAttention, internal::kBackwardInputs,
    internal::kBackwardOutputs, "The gradient of CbamOps>SpatialAttention."};
inline constexpr Signature<ChannelPoolArgs> kChannelPool = {
    "CbamOps>ChannelPool", Module::kChannelPool, internal::kChannelPoolInputs,
    internal::kChannelPoolOutputs, "Mean and maximum over positions, in one read of x."};
inline constexpr Signature<ChannelPoolGradArgs> kChannelPoolGrad = {
    "CbamOps>ChannelPoolGrad", Module::kChannelPool, internal::kChannelPoolGradInputs,
    internal::kChannelPoolGradOutputs, "The gradient of CbamOps>ChannelPool; equal maxima share."};
inline constexpr Signature<SpatialPoolArgs> kSpatialPool = {
    "CbamOps>SpatialPool", Module::kSpatialPool, internal::kSpatialPoolInputs,
    internal::kSpatialPoolOutputs, "Mean and maximum over channels, in one read of x; mean first."};
inline constexpr Signature<SpatialPoolGradArgs> kSpatialPoolGrad = {
    "CbamOps>SpatialPoolGrad", Module::kSpatialPool, internal::kSpatialPoolGradInputs,
    internal::kSpatialPoolGradOutputs, "The gradient of CbamOps>SpatialPool; equal maxima share."};

// For what is done with every op, as a fold:
//   template <const auto&... kSignatures>
//   void RegisterAll(OpList<kSignatures...>) { (Register<kSignatures>(), ...); }
template <const auto&... kSignatures>
struct OpList {};
using AllOps =
    OpList<kCbam, kCbamGrad, kChannelAttention, kChannelAttentionGrad, kSpatialAttention,
           kSpatialAttentionGrad, kChannelPool, kChannelPoolGrad, kSpatialPool, kSpatialPoolGrad>;

}  // namespace ops
}  // namespace cbam_ops

#endif  // CBAM_OPS_OPS_SIGNATURE_H_
