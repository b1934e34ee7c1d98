// What every op takes and gives, written down once: names, types, dimensions and where each
// argument goes in the core's structs.
//
// From these tables come the op definitions and shape functions (ops.cc), the checks and the
// plumbing of the kernels (fused_op.h), and whatever other users of the same ops need (a GPU
// device, an XLA lowering). An argument that belongs to one of the gates is left out of the ops
// that lack that gate, so the whole module and its two halves share the tables.
#ifndef CBAM_OPS_TF_SIGNATURE_H_
#define CBAM_OPS_TF_SIGNATURE_H_

#include <cstdint>
#include <type_traits>

#include "core/contract.h"

namespace cbam_ops {
namespace tf {

// The names of dimensions. kHidden and kKernel are the MLP's width and the convolution's size;
// kStatistics is 2 with batch norm and 0 without.
enum class Dim : int8_t {
  kBatch,
  kHeight,
  kWidth,
  kChannels,
  kHidden,
  kKernel,
  kStatistics,
  kOne,
  kTwo,
};
inline constexpr int kBoundDims = 6;  // the dimensions whose size comes from the arguments

// The dimensions of an argument. Those of a map are written in the order of NHWC and permuted where
// the layout says so.
struct Dims {
  int rank;
  Dim dims[4];
  bool is_map = false;
};
inline constexpr Dims kMap = {
    4, {Dim::kBatch, Dim::kHeight, Dim::kWidth, Dim::kChannels}, /*is_map=*/true};
inline constexpr Dims kTwoPlanes = {
    4, {Dim::kBatch, Dim::kHeight, Dim::kWidth, Dim::kTwo}, /*is_map=*/true};
inline constexpr Dims kPerChannel = {2, {Dim::kBatch, Dim::kChannels}};
inline constexpr Dims kPerPosition = {3, {Dim::kBatch, Dim::kHeight, Dim::kWidth}};
inline constexpr Dims kScalar = {1, {Dim::kOne}};

// kMapType: the type of the feature map (T); kComputeType: double for double, else float (U).
enum class ArgumentType : int8_t { kMapType, kComputeType };

enum class Part : int8_t { kAlways, kChannelGate, kSpatialGate };

// An optional argument is a list of no or one tensor; `count` is the attribute that says which.
struct Argument {
  const char* name;
  ArgumentType type;
  Dims dims;
  Part part;
  const char* count;
};

// `pointer` is the member of the core's struct, or null for what the kernels do not read.
template <typename Args>
struct Input {
  Argument argument;
  const void* Args::* pointer;
};
template <typename Args>
struct Output {
  Argument argument;
  void* Args::* pointer;
};

enum class Kind : int8_t { kCbam, kChannelAttention, kSpatialAttention, kPool };

inline constexpr bool Has(Kind kind, Part part) {
  return part == Part::kAlways || kind == Kind::kCbam ||
         (part == Part::kChannelGate && kind == Kind::kChannelAttention) ||
         (part == Part::kSpatialGate && kind == Kind::kSpatialAttention);
}

template <typename T, int kSize>
struct Table {
  T rows[kSize];
  constexpr const T* begin() const { return rows; }
  constexpr const T* end() const { return rows + kSize; }
};
template <typename T, typename... Rest>
Table(T, Rest...) -> Table<T, 1 + sizeof...(Rest)>;

// An op: what the tables hold for its kind.
template <typename CoreArgs, typename Inputs, typename Outputs>
struct Signature {
  using Args = CoreArgs;
  // Of a gated op; the gradients of the pools need no distinction.
  static constexpr bool kIsGradient = std::is_same_v<CoreArgs, BackwardArgs>;
  const char* op;
  Kind kind;
  const Inputs& inputs;
  const Outputs& outputs;
};

namespace internal {
inline constexpr auto kT = ArgumentType::kMapType;
inline constexpr auto kU = ArgumentType::kComputeType;
inline constexpr auto kAlways = Part::kAlways;
inline constexpr auto kChannel = Part::kChannelGate;
inline constexpr auto kSpatial = Part::kSpatialGate;
inline constexpr const char* kOnce = "";

inline constexpr Dims kW0 = {2, {Dim::kChannels, Dim::kHidden}};
inline constexpr Dims kB0 = {1, {Dim::kHidden}};
inline constexpr Dims kW1 = {2, {Dim::kHidden, Dim::kChannels}};
inline constexpr Dims kB1 = {1, {Dim::kChannels}};
inline constexpr Dims kConvolution = {4, {Dim::kKernel, Dim::kKernel, Dim::kTwo, Dim::kOne}};
inline constexpr Dims kChannelDescriptors = {3, {Dim::kTwo, Dim::kBatch, Dim::kChannels}};
inline constexpr Dims kSpatialDescriptors = {4,
                                             {Dim::kBatch, Dim::kTwo, Dim::kHeight, Dim::kWidth}};
inline constexpr Dims kStatistics = {1, {Dim::kStatistics}};

using F = ForwardArgs;
using B = BackwardArgs;
using CP = ChannelPoolArgs;
using CPG = ChannelPoolGradArgs;
using SP = SpatialPoolArgs;
using SPG = SpatialPoolGradArgs;

inline constexpr Table kForwardInputs = {
    Input<F>{{"x", kT, kMap, kAlways, kOnce}, &F::x},
    Input<F>{{"w0", kU, kW0, kChannel, kOnce}, &F::w0},
    Input<F>{{"b0", kU, kB0, kChannel, kOnce}, &F::b0},
    Input<F>{{"w1", kU, kW1, kChannel, kOnce}, &F::w1},
    Input<F>{{"b1", kU, kB1, kChannel, kOnce}, &F::b1},
    Input<F>{{"kernel", kU, kConvolution, kSpatial, kOnce}, &F::kernel},
    Input<F>{{"bias", kU, kScalar, kSpatial, kOnce}, &F::bias},
    Input<F>{{"gamma", kU, kScalar, kSpatial, "num_gamma"}, &F::gamma},
    Input<F>{{"residual", kT, kMap, kAlways, "num_residual"}, &F::residual},
};
inline constexpr Table kForwardOutputs = {
    Output<F>{{"y", kT, kMap, kAlways, kOnce}, &F::y},
    Output<F>{{"channel_gate", kU, kPerChannel, kChannel, kOnce}, &F::channel_gate},
    Output<F>{{"spatial_gate", kU, kPerPosition, kSpatial, kOnce}, &F::spatial_gate},
    Output<F>{{"channel_descriptors", kU, kChannelDescriptors, kChannel, kOnce},
              &F::channel_descriptors},
    Output<F>{{"spatial_descriptors", kU, kSpatialDescriptors, kSpatial, kOnce},
              &F::spatial_descriptors},
    Output<F>{{"batch_statistics", kU, kStatistics, kSpatial, kOnce}, &F::batch_statistics},
};

// `bias` is there for the gradient of the gradient, which computes the module anew.
inline constexpr Table kBackwardInputs = {
    Input<B>{{"x", kT, kMap, kAlways, kOnce}, &B::x},
    Input<B>{{"dy", kT, kMap, kAlways, kOnce}, &B::dy},
    Input<B>{{"y", kT, kMap, kAlways, "num_y"}, &B::y},
    Input<B>{{"w0", kU, kW0, kChannel, kOnce}, &B::w0},
    Input<B>{{"b0", kU, kB0, kChannel, kOnce}, &B::b0},
    Input<B>{{"w1", kU, kW1, kChannel, kOnce}, &B::w1},
    Input<B>{{"b1", kU, kB1, kChannel, kOnce}, &B::b1},
    Input<B>{{"kernel", kU, kConvolution, kSpatial, kOnce}, &B::kernel},
    Input<B>{{"bias", kU, kScalar, kSpatial, kOnce}, nullptr},
    Input<B>{{"gamma", kU, kScalar, kSpatial, "num_gamma"}, &B::gamma},
    Input<B>{{"channel_gate", kU, kPerChannel, kChannel, kOnce}, &B::channel_gate},
    Input<B>{{"spatial_gate", kU, kPerPosition, kSpatial, kOnce}, &B::spatial_gate},
    Input<B>{{"channel_descriptors", kU, kChannelDescriptors, kChannel, kOnce},
             &B::channel_descriptors},
    Input<B>{{"spatial_descriptors", kU, kSpatialDescriptors, kSpatial, kOnce},
             &B::spatial_descriptors},
    Input<B>{{"batch_statistics", kU, kStatistics, kSpatial, kOnce}, &B::batch_statistics},
    Input<B>{{"d_channel_gate", kU, kPerChannel, kChannel, kOnce}, &B::d_channel_gate},
    Input<B>{{"d_spatial_gate", kU, kPerPosition, kSpatial, kOnce}, &B::d_spatial_gate},
};
inline constexpr Table kBackwardOutputs = {
    Output<B>{{"dx", kT, kMap, kAlways, kOnce}, &B::dx},
    Output<B>{{"dw0", kU, kW0, kChannel, kOnce}, &B::dw0},
    Output<B>{{"db0", kU, kB0, kChannel, kOnce}, &B::db0},
    Output<B>{{"dw1", kU, kW1, kChannel, kOnce}, &B::dw1},
    Output<B>{{"db1", kU, kB1, kChannel, kOnce}, &B::db1},
    Output<B>{{"dkernel", kU, kConvolution, kSpatial, kOnce}, &B::dkernel},
    Output<B>{{"dbias", kU, kScalar, kSpatial, kOnce}, &B::dbias},
    Output<B>{{"dgamma", kU, kScalar, kSpatial, "num_gamma"}, &B::dgamma},
    Output<B>{{"d_residual", kT, kMap, kAlways, "num_d_residual"}, &B::d_residual},
};

inline constexpr Table kChannelPoolInputs = {
    Input<CP>{{"x", kT, kMap, kAlways, kOnce}, &CP::x},
};
inline constexpr Table kChannelPoolOutputs = {
    Output<CP>{{"mean", kT, kPerChannel, kAlways, kOnce}, &CP::mean},
    Output<CP>{{"maximum", kT, kPerChannel, kAlways, kOnce}, &CP::maximum},
};
inline constexpr Table kChannelPoolGradInputs = {
    Input<CPG>{{"x", kT, kMap, kAlways, kOnce}, &CPG::x},
    Input<CPG>{{"maximum", kT, kPerChannel, kAlways, kOnce}, &CPG::maximum},
    Input<CPG>{{"d_mean", kT, kPerChannel, kAlways, kOnce}, &CPG::d_mean},
    Input<CPG>{{"d_maximum", kT, kPerChannel, kAlways, kOnce}, &CPG::d_maximum},
};
inline constexpr Table kChannelPoolGradOutputs = {
    Output<CPG>{{"dx", kT, kMap, kAlways, kOnce}, &CPG::dx},
};
inline constexpr Table kSpatialPoolInputs = {
    Input<SP>{{"x", kT, kMap, kAlways, kOnce}, &SP::x},
};
inline constexpr Table kSpatialPoolOutputs = {
    Output<SP>{{"descriptors", kT, kTwoPlanes, kAlways, kOnce}, &SP::descriptors},
};
inline constexpr Table kSpatialPoolGradInputs = {
    Input<SPG>{{"x", kT, kMap, kAlways, kOnce}, &SPG::x},
    Input<SPG>{{"descriptors", kT, kTwoPlanes, kAlways, kOnce}, &SPG::descriptors},
    Input<SPG>{{"d_descriptors", kT, kTwoPlanes, kAlways, kOnce}, &SPG::d_descriptors},
};
inline constexpr Table kSpatialPoolGradOutputs = {
    Output<SPG>{{"dx", kT, kMap, kAlways, kOnce}, &SPG::dx},
};

template <typename Args, typename Inputs, typename Outputs>
constexpr Signature<Args, Inputs, Outputs> MakeSignature(const char* op, Kind kind,
                                                         const Inputs& inputs,
                                                         const Outputs& outputs) {
  return {op, kind, inputs, outputs};
}
}  // namespace internal

inline constexpr auto kCbam = internal::MakeSignature<ForwardArgs>(
    "CbamOps>Cbam", Kind::kCbam, internal::kForwardInputs, internal::kForwardOutputs);
inline constexpr auto kCbamGrad = internal::MakeSignature<BackwardArgs>(
    "CbamOps>CbamGrad", Kind::kCbam, internal::kBackwardInputs, internal::kBackwardOutputs);
inline constexpr auto kChannelAttention =
    internal::MakeSignature<ForwardArgs>("CbamOps>ChannelAttention", Kind::kChannelAttention,
                                         internal::kForwardInputs, internal::kForwardOutputs);
inline constexpr auto kChannelAttentionGrad =
    internal::MakeSignature<BackwardArgs>("CbamOps>ChannelAttentionGrad", Kind::kChannelAttention,
                                          internal::kBackwardInputs, internal::kBackwardOutputs);
inline constexpr auto kSpatialAttention =
    internal::MakeSignature<ForwardArgs>("CbamOps>SpatialAttention", Kind::kSpatialAttention,
                                         internal::kForwardInputs, internal::kForwardOutputs);
inline constexpr auto kSpatialAttentionGrad =
    internal::MakeSignature<BackwardArgs>("CbamOps>SpatialAttentionGrad", Kind::kSpatialAttention,
                                          internal::kBackwardInputs, internal::kBackwardOutputs);
inline constexpr auto kChannelPool = internal::MakeSignature<ChannelPoolArgs>(
    "CbamOps>ChannelPool", Kind::kPool, internal::kChannelPoolInputs,
    internal::kChannelPoolOutputs);
inline constexpr auto kChannelPoolGrad = internal::MakeSignature<ChannelPoolGradArgs>(
    "CbamOps>ChannelPoolGrad", Kind::kPool, internal::kChannelPoolGradInputs,
    internal::kChannelPoolGradOutputs);
inline constexpr auto kSpatialPool = internal::MakeSignature<SpatialPoolArgs>(
    "CbamOps>SpatialPool", Kind::kPool, internal::kSpatialPoolInputs,
    internal::kSpatialPoolOutputs);
inline constexpr auto kSpatialPoolGrad = internal::MakeSignature<SpatialPoolGradArgs>(
    "CbamOps>SpatialPoolGrad", Kind::kPool, internal::kSpatialPoolGradInputs,
    internal::kSpatialPoolGradOutputs);

}  // namespace tf
}  // namespace cbam_ops

#endif  // CBAM_OPS_TF_SIGNATURE_H_
