// The channel gate's shared MLP, forward and backward, over whole batches of samples; t is the mean
// and the max:
//
//   forward   HiddenKernel          hidden_t = relu(t W0 + b0)
//             GateKernel            g_c = sigmoid(sum_t f(hidden_t W1 + b1))
//   backward  GateKernel            dl_t = (dg_c + d_channel_gate) g_c (1 - g_c) f'(...); computes
//                                   the logits again if f is a ReLU
//             HiddenGradKernel      dh_t = (dl_t W1^T) (hidden_t > 0)
//             DescriptorGradKernel  dt = dh_t W0^T; writes the channels' sides of pass C
//             OuterKernel           dW1 = sum hidden_t^T dl_t, db1 = sum dl_t,
//                                   dW0 = sum t^T dh_t, db0 = sum dh_t
//
// The maps are not touched here; what costs is reading W0 and W1 (2 C hidden values, at 7 x 7 x
// 2048 five times a sample's map) and the latency of short sums. So kSamples samples share each
// read of a weight, 16 sums per thread with both descriptors, and the inner dimension is spread
// over the threads of a block and folded through shared memory in a fixed order.
#ifndef CBAM_OPS_CORE_CUDA_GATE_MLP_CUH_
#define CBAM_OPS_CORE_CUDA_GATE_MLP_CUH_

#include "core/cuda/reduce.cuh"

namespace cbam_ops {
namespace cuda {

constexpr int kSamples = 8;  // that share a read of the weights
constexpr int kSums =
    2 * kSamples;          // sums per thread: both descriptors of each sample, [sample][descriptor]
constexpr int kUnits = 8;  // hidden units per block of HiddenKernel and HiddenGradKernel
constexpr int kSlice = 256;  // of the inner dimension, in shared memory at a time

template <typename A>
struct MlpParams {
  int64_t samples;
  int64_t channels;
  int64_t hidden;
  int64_t tiles;  // of units or channels; the grid is tiles x ceil(samples / kSamples)
  bool use_mean;
  bool use_max;
  bool relu;  // f
  const A* w0;
  const A* b0;
  const A* w1;
  const A* b1;
  const A* descriptors;  // [2, N, C] of which `samples` from here; the maxima are descriptor_stride
                         // further
  int64_t descriptor_stride;
  A* hidden_values;  // [n, 2, hidden]
  A* gate;           // [n, C], read in backward
  // Backward.
  const A* d_gate;        // [n, C], from pass B
  const A* d_gate_other;  // [n, C] or null
  A* d_logits;            // [n, 2, C]
  A* d_hidden;            // [n, 2, hidden]
  const A* count;         // [n, C], positions that attain the maximum
  A positions;
  Side<A>* channels_side;  // [n, C]
};

constexpr int kMlpSharedValues = kSums * kSlice;

// Grid: sample tiles x unit tiles. Threads: kUnits units x 32 that share the channels.
template <typename A>
CBAM_KERNEL(2)
HiddenKernel(MlpParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const int unit_thread = ThreadIndex() % kUnits, row_thread = ThreadIndex() / kUnits;
  const int64_t unit = Remainder(BlockIndex(), params.tiles) * kUnits + unit_thread;
  const int64_t first_sample = Quotient(BlockIndex(), params.tiles) * kSamples;
  A* const shared = reinterpret_cast<A*>(SharedMemory());
  A sums[kSums];
  CBAM_UNROLL
  for (int s = 0; s < kSums; ++s) sums[s] = A(0);
  for (int64_t slice = 0; slice < params.channels; slice += kSlice) {
    const int size = static_cast<int>(Smaller(kSlice, params.channels - slice));
    for (int i = ThreadIndex(); i < kSums * kSlice; i += kThreads) {
      const int s = i / kSlice, c = i % kSlice;
      const int64_t sample = first_sample + s / 2;
      A value = A(0);
      if (c < size && sample < params.samples) {
        value = params.descriptors[(s % 2) * params.descriptor_stride + sample * params.channels +
                                   slice + c];
      }
      shared[c * kSums + s] = value;
    }
    Barrier();
    if (unit < params.hidden) {
      for (int c = row_thread; c < size; c += kThreads / kUnits) {
        const A weight = params.w0[(slice + c) * params.hidden + unit];
        CBAM_UNROLL
        for (int q = 0; q < kSums; q += 4) {
          const Vec<A, 4> four = Load<A, 4>(shared + c * kSums + q);
          CBAM_UNROLL
          for (int i = 0; i < 4; ++i) sums[q + i] += four.value[i] * weight;
        }
      }
    }
    Barrier();
  }
  CBAM_UNROLL
  for (int s = 0; s < kSums; ++s) shared[s * kThreads + ThreadIndex()] = sums[s];
  Barrier();
  for (int i = ThreadIndex(); i < kSums * kUnits; i += kThreads) {
    const int s = i / kUnits;
    const int64_t sample = first_sample + s / 2,
                  this_unit = Remainder(BlockIndex(), params.tiles) * kUnits + i % kUnits;
    if (sample >= params.samples || this_unit >= params.hidden) continue;
    A sum = A(0);
    for (int r = 0; r < kThreads / kUnits; ++r)
      sum += shared[s * kThreads + r * kUnits + i % kUnits];
    if (params.b0 != nullptr) sum += params.b0[this_unit];
    const bool used = s % 2 == 0 ? params.use_mean : params.use_max;
    params.hidden_values[(sample * 2 + s % 2) * params.hidden + this_unit] =
        used ? Relu(sum) : A(0);
  }
}

// Grid: sample tiles x tiles of kWarp channels. Warps share the hidden units.
template <typename A, bool kGrad>
CBAM_KERNEL(2)
GateKernel(MlpParams<A> params) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps == kSamples, "the last step gives each warp one sample");
  WaitForPredecessors();
  AllowSuccessors();
  const int lane = ThreadIndex() % kWarp, warp = ThreadIndex() / kWarp;
  const int64_t c = Remainder(BlockIndex(), params.tiles) * kWarp + lane;
  const int64_t first_sample = Quotient(BlockIndex(), params.tiles) * kSamples;
  A* const shared = reinterpret_cast<A*>(SharedMemory());
  const bool need_logits = !kGrad || params.relu;
  A sums[kSums];
  CBAM_UNROLL
  for (int s = 0; s < kSums; ++s) sums[s] = A(0);
  if (need_logits) {
    for (int64_t slice = 0; slice < params.hidden; slice += kSlice) {
      const int size = static_cast<int>(Smaller(kSlice, params.hidden - slice));
      for (int i = ThreadIndex(); i < kSums * size; i += kThreads) {
        const int s = i / size, j = i % size;
        const int64_t sample = first_sample + s / 2;
        A value = A(0);
        if (sample < params.samples)
          value = params.hidden_values[(sample * 2 + s % 2) * params.hidden + slice + j];
        shared[j * kSums + s] = value;
      }
      Barrier();
      if (c < params.channels) {
        for (int j = warp; j < size; j += kWarps) {
          const A weight = params.w1[(slice + j) * params.channels + c];
          CBAM_UNROLL
          for (int q = 0; q < kSums; q += 4) {
            const Vec<A, 4> four = Load<A, 4>(shared + j * kSums + q);
            CBAM_UNROLL
            for (int i = 0; i < 4; ++i) sums[q + i] += four.value[i] * weight;
          }
        }
      }
      Barrier();
    }
    CBAM_UNROLL
    for (int s = 0; s < kSums; ++s) shared[s * kThreads + ThreadIndex()] = sums[s];
    Barrier();
  }
  const int64_t sample = first_sample + warp;
  if (sample >= params.samples || c >= params.channels) return;
  A logits[2] = {A(0), A(0)};
  if (need_logits) {
    for (int t = 0; t < 2; ++t) {
      A sum = A(0);
      for (int w = 0; w < kWarps; ++w) sum += shared[(warp * 2 + t) * kThreads + w * kWarp + lane];
      logits[t] = params.b1 != nullptr ? sum + params.b1[c] : sum;
    }
  }
  const int64_t at = sample * params.channels + c;
  if constexpr (kGrad) {
    const A gate = params.gate[at];
    A d_gate = params.d_gate[at];
    if (params.d_gate_other != nullptr) d_gate += params.d_gate_other[at];
    const A d_logit = d_gate * gate * (A(1) - gate);
    for (int t = 0; t < 2; ++t) {
      const bool used = t == 0 ? params.use_mean : params.use_max;
      const bool passes = used && (!params.relu || logits[t] > A(0));
      params.d_logits[(sample * 2 + t) * params.channels + c] = passes ? d_logit : A(0);
    }
  } else {
    A sum = A(0);
    for (int t = 0; t < 2; ++t) {
      const bool used = t == 0 ? params.use_mean : params.use_max;
      if (used) sum += params.relu ? Relu(logits[t]) : logits[t];
    }
    params.gate[at] = Sigmoid(sum);
  }
}

// Grid: sample tiles x unit tiles. Each warp has a unit, its lanes share the channels.
template <typename A>
CBAM_KERNEL(2)
HiddenGradKernel(MlpParams<A> params) {
  static_assert(kThreads / kWarp == kUnits, "a warp per unit");
  WaitForPredecessors();
  AllowSuccessors();
  const int lane = ThreadIndex() % kWarp;
  const int64_t unit = Remainder(BlockIndex(), params.tiles) * kUnits + ThreadIndex() / kWarp;
  const int64_t first_sample = Quotient(BlockIndex(), params.tiles) * kSamples;
  A* const shared = reinterpret_cast<A*>(SharedMemory());
  A sums[kSums];
  CBAM_UNROLL
  for (int s = 0; s < kSums; ++s) sums[s] = A(0);
  for (int64_t slice = 0; slice < params.channels; slice += kSlice) {
    const int size = static_cast<int>(Smaller(kSlice, params.channels - slice));
    for (int i = ThreadIndex(); i < kSums * kSlice; i += kThreads) {
      const int s = i / kSlice, c = i % kSlice;
      const int64_t sample = first_sample + s / 2;
      A value = A(0);
      if (c < size && sample < params.samples)
        value = params.d_logits[(sample * 2 + s % 2) * params.channels + slice + c];
      shared[i] = value;
    }
    Barrier();
    if (unit < params.hidden) {
      for (int c = lane; c < size; c += kWarp) {
        const A weight = params.w1[unit * params.channels + slice + c];
        CBAM_UNROLL
        for (int s = 0; s < kSums; ++s) sums[s] += shared[s * kSlice + c] * weight;
      }
    }
    Barrier();
  }
  CBAM_UNROLL
  for (int s = 0; s < kSums; ++s) {
    const A sum = SumOverLanes(sums[s], kWarp);
    const int64_t sample = first_sample + s / 2;
    if (lane != 0 || unit >= params.hidden || sample >= params.samples) continue;
    const int64_t at = (sample * 2 + s % 2) * params.hidden + unit;
    params.d_hidden[at] = params.hidden_values[at] > A(0) ? sum : A(0);
  }
}

// Grid: sample tiles x tiles of kWarp channels; a thread has one channel of one sample. The lanes'
// rows of W0 lie `hidden` apart, but every line that is fetched is used up by the next units, and
// by the other warps.
template <typename A>
CBAM_KERNEL(2)
DescriptorGradKernel(MlpParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const int64_t c = Remainder(BlockIndex(), params.tiles) * kWarp + ThreadIndex() % kWarp;
  const int64_t sample = Quotient(BlockIndex(), params.tiles) * kSamples + ThreadIndex() / kWarp;
  if (sample >= params.samples || c >= params.channels) return;
  A d_mean = A(0), d_max = A(0);
  const A* const d_hidden = params.d_hidden + sample * 2 * params.hidden;
  for (int64_t j = 0; j < params.hidden; ++j) {
    const A weight = params.w0[c * params.hidden + j];
    d_mean += d_hidden[j] * weight;
    d_max += d_hidden[params.hidden + j] * weight;
  }
  const int64_t at = sample * params.channels + c;
  params.channels_side[at] =
      MakeSide(params.gate[at], params.use_mean ? d_mean : A(0), params.positions, params.use_max,
               d_max, params.count[at], params.descriptors[params.descriptor_stride + at]);
}

// out[a, b] = sum over samples and descriptors of left[., a] * right[., b], and bias[b] = sum of
// right[., b]. Grid: tiles of kUnits a x tiles of kWarp b; 8 warps share the samples. Shared
// memory: (kUnits + 1) * kThreads values.
template <typename A>
struct OuterParams {
  int64_t samples;
  const A*
      left;  // element a of descriptor t of sample n at n * left_sample + t * left_descriptor + a
  int64_t left_size, left_sample, left_descriptor;
  const A* right;
  int64_t right_size, right_sample, right_descriptor;
  int64_t right_tiles;
  A* out;   // [left_size, right_size]
  A* bias;  // [right_size] or null
};

template <typename A>
CBAM_KERNEL(2)
OuterKernel(OuterParams<A> params) {
  WaitForPredecessors();
  AllowSuccessors();
  const int lane = ThreadIndex() % kWarp, warp = ThreadIndex() / kWarp;
  const int64_t first_a = Quotient(BlockIndex(), params.right_tiles) * kUnits;
  const int64_t b = Remainder(BlockIndex(), params.right_tiles) * kWarp + lane;
  A sums[kUnits + 1];  // the last is the bias's
  CBAM_UNROLL
  for (int i = 0; i <= kUnits; ++i) sums[i] = A(0);
  if (b < params.right_size) {
    for (int64_t n = warp; n < params.samples; n += kThreads / kWarp) {
      for (int t = 0; t < 2; ++t) {
        const A right = params.right[n * params.right_sample + t * params.right_descriptor + b];
        const A* const left = params.left + n * params.left_sample + t * params.left_descriptor;
        CBAM_UNROLL
        for (int i = 0; i < kUnits; ++i)
          sums[i] += left[Smaller(first_a + i, params.left_size - 1)] * right;
        sums[kUnits] += right;
      }
    }
  }
  A* const shared = reinterpret_cast<A*>(SharedMemory());
  CBAM_UNROLL
  for (int i = 0; i <= kUnits; ++i) shared[i * kThreads + ThreadIndex()] = sums[i];
  Barrier();
  for (int i = warp; i <= kUnits; i += kThreads / kWarp) {
    A sum = A(0);
    for (int w = 0; w < kThreads / kWarp; ++w) sum += shared[i * kThreads + w * kWarp + lane];
    if (b >= params.right_size) continue;
    if (i < kUnits && first_a + i < params.left_size)
      params.out[(first_a + i) * params.right_size + b] = sum;
    if (i == kUnits && first_a == 0 && params.bias != nullptr) params.bias[b] = sum;
  }
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_GATE_MLP_CUH_
