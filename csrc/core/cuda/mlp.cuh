// The channel gate's shared MLP, forward and backward; t is the mean and the max:
//
//   forward   Hidden          hidden_t = relu(t W0 + b0)
//             Gate            g_c = sigmoid(sum_t f(hidden_t W1 + b1))
//   backward  Hidden          again
//             Gate            the logits again, if f is a ReLU
//             HiddenGrad      dl_t = (dg_c + d_channel_gate) g_c (1 - g_c) f'(...)
//                             dh_t = (dl_t W1^T) (hidden_t > 0)
//             ChannelSides    dt = dh_t W0^T: what pass C needs of channels
//             WeightGradient  dW1 = sum hidden_t^T dl_t, db1 = sum dl_t,
//                             dW0 = sum t^T dh_t, db0 = sum dh_t
//
// The maps are not touched here; what costs is reading W0 and W1 (2 C hidden values, at 7 x 7 x
// 2048 five times a sample's map) and the latency of short sums. So the samples of a group, up to
// kSamples, share each read of a weight: 16 sums per thread with both descriptors. The inner
// dimension is spread over the threads and folded through shared memory in a fixed order.
#ifndef CBAM_OPS_CORE_CUDA_MLP_CUH_
#define CBAM_OPS_CORE_CUDA_MLP_CUH_

#include "core/cuda/plan.h"
#include "core/cuda/sides.cuh"

namespace cbam_ops {
namespace cuda {

constexpr int kSums = 2 * kSamples;  // per thread: both descriptors of each sample
// What goes with one inner index lies together: its sums in four vectors. 20 apart instead of 16,
// so that eight neighbours fill all banks.
constexpr int kSumsApart = kSums + 4;
template <typename A>
constexpr int kSlice = 512 / static_cast<int>(sizeof(A));  // of the inner dimension at a time

// The samples of a group.
template <typename A>
struct Group {
  int64_t first;
  int present;
  CBAM_DEVICE Group(const Call<A>& call, int64_t group)
      : first(group * call.schedule.group_samples),
        present(static_cast<int>(Smaller(call.schedule.group_samples, call.batch - first))) {}
};

// shared[i * kSumsApart + 2 s + t] = descriptor t of sample s at inner index i; value(s, i, &mean,
// &max) gives both.
template <int kSize, typename A, typename Value>
CBAM_DEVICE void FillSums(A* shared, int size, int present, Value value) {
  CBAM_NO_UNROLL
  for (int at = ThreadIndex(); at < kSize * kSamples / 2; at += kThreads) {
    const int i = at % kSize, pair = at / kSize;
    Vec<A, 4> four;
    CBAM_UNROLL
    for (int k = 0; k < 4; ++k) four.value[k] = A(0);
    CBAM_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int s = 2 * pair + k;
      if (i < size && s < present) value(s, i, &four.value[2 * k], &four.value[2 * k + 1]);
    }
    *reinterpret_cast<Vec<A, 4>*>(shared + i * kSumsApart + 4 * pair) = four;
  }
}

// Both descriptors' values of a sample: [N, 2, size].
template <typename A>
CBAM_DEVICE void ReadPair(const A* values, int64_t size, int64_t n, int64_t i, A* mean,
                          A* maximum) {
  *mean = values[n * 2 * size + i];
  *maximum = values[(n * 2 + 1) * size + i];
}

// Weights of a product, [inner, outputs] or, read the other way round, [outputs, inner].
template <typename A>
struct Weights {
  const A* data;
  int64_t outputs;
  int64_t inner;
};

// For the outputs of a tile of kLanes: shared[s * kThreads + r * kLanes + lane] = the part that is
// thread r's of the sum over inner indices i of values(s, i) weight(output, i). Whatever they read,
// all threads may use it after this, by Folded. Weights whose inner indices lie side by side come by
// way of shared memory; the others are read where they are.
template <int kLanes, bool kInnerFirst, typename A, typename Value>
CBAM_DEVICE void SumProducts(const Weights<A>& weights, int64_t tile, int present, A* shared,
                             Value value) {
  // Half of the shared memory for these weights.
  constexpr int kTile = kItemBytes / 2 / static_cast<int>(sizeof(A)) / kLanes - 1;
  constexpr int kSize = kInnerFirst ? (kTile >= 128 ? 128 : kTile >= 32 ? 32 : 16) : kSlice<A>;
  static_assert((kSize + 1) * kLanes + kSize * kSumsApart <=
                    (kInnerFirst ? kItemBytes / static_cast<int>(sizeof(A)) : 1 << 30),
                "more shared memory than there is");
  const int lane = ThreadIndex() % kLanes, row_thread = ThreadIndex() / kLanes;
  const int64_t output = tile * kLanes + lane;
  A* const staged = shared + kSize * kSumsApart;
  A sums[kSums];
  CBAM_UNROLL
  for (int s = 0; s < kSums; ++s) sums[s] = A(0);
  CBAM_NO_UNROLL
  for (int64_t slice = 0; slice < weights.inner; slice += kSize) {
    const int size = static_cast<int>(Smaller(kSize, weights.inner - slice));
    FillSums<kSize>(shared, size, present,
                    [&](int s, int i, A* mean, A* maximum) { value(s, slice + i, mean, maximum); });
    if constexpr (kInnerFirst) {
      CBAM_UNROLL_4
      for (int at = ThreadIndex(); at < kLanes * kSize; at += kThreads) {
        const int64_t row = tile * kLanes + at / kSize;
        const int i = at % kSize;
        staged[at / kSize * (kSize + 1) + i] = row < weights.outputs && i < size
                                                   ? weights.data[row * weights.inner + slice + i]
                                                   : A(0);
      }
    }
    Barrier();
    if (output < weights.outputs) {
      CBAM_UNROLL_4
      for (int i = row_thread; i < size; i += kThreads / kLanes) {
        const A weight = kInnerFirst ? staged[lane * (kSize + 1) + i]
                                     : weights.data[(slice + i) * weights.outputs + output];
        CBAM_UNROLL
        for (int q = 0; q < kSums; q += 4) {
          const Vec<A, 4> four = Load<A, 4>(shared + i * kSumsApart + q);
          CBAM_UNROLL
          for (int j = 0; j < 4; ++j) sums[q + j] += four.value[j] * weight;
        }
      }
    }
    Barrier();
  }
  CBAM_UNROLL
  for (int s = 0; s < kSums; ++s) shared[s * kThreads + ThreadIndex()] = sums[s];
  Barrier();
}

// Calls store(s, output, mean's sum, max's sum) for a tile's outputs of the samples that are there.
template <int kLanes, typename A, typename Store>
CBAM_DEVICE void Folded(const Weights<A>& weights, int64_t tile, int present, const A* shared,
                        Store store) {
  CBAM_NO_UNROLL
  for (int at = ThreadIndex(); at < present * kLanes; at += kThreads) {
    const int s = at / kLanes, lane = at % kLanes;
    if (tile * kLanes + lane >= weights.outputs) continue;
    A sums[2] = {A(0), A(0)};
    CBAM_NO_UNROLL
    for (int r = 0; r < kThreads / kLanes; ++r) {
      sums[0] += shared[2 * s * kThreads + r * kLanes + lane];
      sums[1] += shared[(2 * s + 1) * kThreads + r * kLanes + lane];
    }
    store(s, tile * kLanes + lane, sums[0], sums[1]);
  }
}

// An item is kUnits hidden units.
template <typename A>
CBAM_DEVICE void Hidden(const Call<A>& call, int64_t group_index, int tile) {
  const Group<A> group(call, group_index);
  const Weights<A> weights = {call.w0, call.hidden, call.channels};
  A* const shared = Shared<A>();
  SumProducts<kUnits, false>(
      weights, tile, group.present, shared, [&](int s, int64_t c, A* mean, A* maximum) {
        const int64_t n = group.first + s;
        Fold<true>(call.channel_source, n, c, mean, maximum);
        if (tile == 0 && call.channel_descriptors != nullptr) {
          A* const descriptor = call.channel_descriptors + n * call.channels + c;
          descriptor[0] = call.use_mean ? *mean : A(0);
          descriptor[call.batch * call.channels] = call.use_max ? *maximum : A(0);
        }
      });
  Folded<kUnits>(weights, tile, group.present, shared, [&](int s, int64_t unit, A mean, A maximum) {
    const A bias = call.b0 != nullptr ? call.b0[unit] : A(0);
    A* const hidden = call.hidden_values + (group.first + s) * 2 * call.hidden + unit;
    hidden[0] = call.use_mean ? Relu(mean + bias) : A(0);
    hidden[call.hidden] = call.use_max ? Relu(maximum + bias) : A(0);
  });
}

// An item is kGateChannels channels: the gate, or in backward the logits alone.
template <typename A>
CBAM_DEVICE void Gate(const Call<A>& call, int64_t group_index, int tile, bool logits_only) {
  const Group<A> group(call, group_index);
  const Weights<A> weights = {call.w1, call.channels, call.hidden};
  A* const shared = Shared<A>();
  SumProducts<kGateChannels, false>(
      weights, tile, group.present, shared, [&](int s, int64_t j, A* mean, A* maximum) {
        ReadPair(call.hidden_values, call.hidden, group.first + s, j, mean, maximum);
      });
  Folded<kGateChannels>(
      weights, tile, group.present, shared, [&](int s, int64_t c, A mean, A maximum) {
        const int64_t n = group.first + s;
        const A bias = call.b1 != nullptr ? call.b1[c] : A(0);
        mean += bias;
        maximum += bias;
        if (logits_only) {
          call.logits[n * 2 * call.channels + c] = mean;
          call.logits[(n * 2 + 1) * call.channels + c] = maximum;
          return;
        }
        if (call.mlp_relu) {
          mean = Relu(mean);
          maximum = Relu(maximum);
        }
        const A sum = (call.use_mean ? mean : A(0)) + (call.use_max ? maximum : A(0));
        call.channel_gate[n * call.channels + c] = Sigmoid(sum);
      });
}

// An item is kUnits hidden units.
template <typename A>
CBAM_DEVICE void HiddenGrad(const Call<A>& call, int64_t group_index, int tile) {
  const Group<A> group(call, group_index);
  const Weights<A> weights = {call.w1, call.hidden, call.channels};
  A* const shared = Shared<A>();
  SumProducts<kUnits, true>(
      weights, tile, group.present, shared, [&](int s, int64_t c, A* mean, A* maximum) {
        const int64_t n = group.first + s, at = n * call.channels + c;
        A d_gate, count;
        Fold<false>(call.channel_pass, n, c, &d_gate, &count);
        if (call.d_channel_gate != nullptr) d_gate += call.d_channel_gate[at];
        const A gate = call.channel_gate[at];
        const A d_logit = d_gate * gate * (A(1) - gate);
        A d_logits[2];
        for (int t = 0; t < 2; ++t) {
          const int64_t to = (n * 2 + t) * call.channels + c;
          const bool passes =
              (t == 0 ? call.use_mean : call.use_max) && (!call.mlp_relu || call.logits[to] > A(0));
          d_logits[t] = passes ? d_logit : A(0);
          if (tile == 0) call.d_logits[to] = d_logits[t];
        }
        *mean = d_logits[0];
        *maximum = d_logits[1];
      });
  Folded<kUnits>(weights, tile, group.present, shared, [&](int s, int64_t unit, A mean, A maximum) {
    const int64_t at = (group.first + s) * 2 * call.hidden + unit;
    call.d_hidden[at] = call.hidden_values[at] > A(0) ? mean : A(0);
    call.d_hidden[at + call.hidden] = call.hidden_values[at + call.hidden] > A(0) ? maximum : A(0);
  });
}

// An item is kGateChannels channels.
template <typename A>
CBAM_DEVICE void ChannelSides(const Call<A>& call, int64_t group_index, int tile) {
  const Group<A> group(call, group_index);
  const Weights<A> weights = {call.w0, call.channels, call.hidden};
  A* const shared = Shared<A>();
  SumProducts<kGateChannels, true>(
      weights, tile, group.present, shared, [&](int s, int64_t j, A* mean, A* maximum) {
        ReadPair(call.d_hidden, call.hidden, group.first + s, j, mean, maximum);
      });
  Folded<kGateChannels>(weights, tile, group.present, shared,
                        [&](int s, int64_t c, A d_mean, A d_max) {
                          const int64_t n = group.first + s, at = n * call.channels + c;
                          A d_gate, count;
                          Fold<false>(call.channel_pass, n, c, &d_gate, &count);
                          StoreSide(call.channel_sides, n, c,
                                    MakeSide(call.channel_gate[at], call.use_mean ? d_mean : A(0),
                                             static_cast<A>(call.positions), call.use_max, d_max,
                                             count, call.channel_maximum[at]));
                        });
}

// out[a, b] = sum over k of left[k, a] right[k, b], and bias[b] = sum over k of right[k, b], k over
// samples and descriptors. An item is kOuterLeft x kOuterRight of them, 2 x 4 for each thread.
template <typename A>
CBAM_DEVICE void WeightGradient(const Call<A>& call, int tile, bool of_w0) {
  constexpr int kTerms = 32;
  const int64_t left_size = of_w0 ? call.channels : call.hidden;
  const int64_t right_size = of_w0 ? call.hidden : call.channels;
  const A* const rights = of_w0 ? call.d_hidden : call.d_logits;
  A* const out = of_w0 ? call.dw0 : call.dw1;
  A* const bias = of_w0 ? call.db0 : call.db1;
  const int64_t tiles = (right_size + kOuterRight - 1) / kOuterRight;
  const int64_t first_a = Quotient(tile, tiles) * kOuterLeft;
  const int64_t first_b = Remainder(tile, tiles) * kOuterRight;
  const int a = ThreadIndex() / 16 * 2, b = ThreadIndex() % 16 * 4;
  A* const left = Shared<A>();
  A* const right = left + kTerms * kOuterLeft;
  A sums[2][4] = {}, bias_sum = A(0);
  for (int64_t first = 0; first < 2 * call.batch; first += kTerms) {
    const int size = static_cast<int>(Smaller(kTerms, 2 * call.batch - first));
    CBAM_NO_UNROLL
    for (int i = ThreadIndex(); i < size * kOuterLeft; i += kThreads) {
      const int64_t k = first + i / kOuterLeft, at = first_a + i % kOuterLeft;
      A value = A(0);
      if (at < left_size) {
        value = of_w0 ? call.channel_source.first[(k % 2 * call.batch + k / 2) * left_size + at]
                      : call.hidden_values[k * left_size + at];
      }
      left[i] = value;
    }
    CBAM_NO_UNROLL
    for (int i = ThreadIndex(); i < size * kOuterRight; i += kThreads) {
      const int64_t k = first + i / kOuterRight, at = first_b + i % kOuterRight;
      right[i] = at < right_size ? rights[k * right_size + at] : A(0);
    }
    Barrier();
    CBAM_NO_UNROLL
    for (int k = 0; k < size; ++k) {
      const Vec<A, 2> lefts = Load<A, 2>(left + k * kOuterLeft + a);
      const Vec<A, 4> four = Load<A, 4>(right + k * kOuterRight + b);
      CBAM_UNROLL
      for (int i = 0; i < 2; ++i) {
        CBAM_UNROLL
        for (int j = 0; j < 4; ++j) sums[i][j] += lefts.value[i] * four.value[j];
      }
      if (first_a == 0 && ThreadIndex() < kOuterRight)
        bias_sum += right[k * kOuterRight + ThreadIndex()];
    }
    Barrier();
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      if (first_a + a + i < left_size && first_b + b + j < right_size)
        out[(first_a + a + i) * right_size + first_b + b + j] = sums[i][j];
    }
  }
  if (first_a == 0 && ThreadIndex() < kOuterRight && first_b + ThreadIndex() < right_size &&
      bias != nullptr) {
    bias[first_b + ThreadIndex()] = bias_sum;
  }
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MLP_CUH_
