// The channel gate's shared MLP, forward and backward; t is the mean and the max:
//
//   forward   Hidden          hidden_t = relu(t W0 + b0), of long sums slices
//             FoldHidden      those of a sample
//             Gate            g_c, as Problem has it (contract.h)
//   backward  Hidden          again
//             Gate            the logits again, where their gradients need them
//             HiddenGrad      dl_t = (dg_c + d_channel_gate) g_c (1 - g_c) f'(...), or with the
//                                    slope of t's own gate
//                             dh_t = (dl_t W1^T) (hidden_t > 0), in slices as Hidden
//             ChannelSides    dt = dh_t W0^T: what pass C needs of channels
//             WeightGradient  dW1 = sum hidden_t^T dl_t, db1 = sum dl_t,
//                             dW0 = sum t^T dh_t, db0 = sum dh_t
//
// The maps are not touched here; what costs is reading W0 and W1 (2 C hidden values, at 7 x 7 x
// 2048 five times a sample's map), the products with them, and the latency of short sums. So the
// samples of a group, up to kSamples, share each read of a weight. A thread sums for four outputs
// of two samples, both descriptors, at four inner indices at a time: 64 products for four vectors
// of weights and four of inputs. The inner dimension is spread over the threads and folded through
// shared memory in a fixed order.
//
// Where hidden units are added (AddsHidden) the second layer has one branch, of their sum, and a
// thread four samples. The gradient dl is then one too.
#ifndef CBAM_OPS_CORE_CUDA_MLP_CUH_
#define CBAM_OPS_CORE_CUDA_MLP_CUH_

#include "core/cuda/plan.h"
#include "core/cuda/sides.cuh"

namespace cbam_ops {
namespace cuda {

// Inner indices whose inputs are in shared memory at a time.
template <typename A>
constexpr int kInputs = 1024 / static_cast<int>(sizeof(A));

// The samples of a group.
template <typename A>
struct Group {
  int64_t first;
  int present;
  CBAM_DEVICE Group(const Call<A>& call, int64_t group)
      : first(group * call.schedule.group_samples),
        present(static_cast<int>(Smaller(call.schedule.group_samples, call.batch - first))) {}
};

// What the second layer takes of a sample: both descriptors' values, or their sum.
template <typename A>
CBAM_DEVICE int OuterBranches(const Call<A>& call) {
  return call.by_branch ? 2 : 1;
}

// Four inputs at an inner index are a vector: of two samples both branches, or of four the only one.
// Vectors lie in kBlockSide rows, those of inner index i in row i % kBlockSide at i / kBlockSide:
// indices that are a block apart are neighbours, as the threads that read them are, and with two
// vectors between the rows a warp writes to all banks too.
template <typename A>
constexpr int kInputRow = kInputs<A> + 2 * kBlockSide;
static_assert(kSamples / 2 * kBlockSide * kInputRow<double> * sizeof(double) <= kItemBytes,
              "more shared memory than there is");

// Fills the inputs at `size` inner indices, and with zeros what completes a block or a vector;
// value(s, i, &first, &second) gives the branches of sample s.
template <typename A, typename Value>
CBAM_DEVICE void FillInputs(A* shared, unsigned size, int present, int branches, Value value) {
  const unsigned end = (size + kBlockSide - 1) / kBlockSide * kBlockSide;
  // Of a vector: neighbouring threads have them.
  const int samples = present > 1 ? 4 / branches : 1;
  const int slot = ThreadIndex() % samples, step = kThreads / samples;
  const unsigned begin = ThreadIndex() / samples;  // from there on all in one of the rows
  A* rows = shared + begin % kBlockSide * kInputRow<A> + begin / kBlockSide * kBlockSide +
            slot * (4 / samples);
  CBAM_NO_UNROLL
  for (int first = 0; first < present; first += samples) {
    A* to = rows;
    CBAM_NO_UNROLL
    for (unsigned i = begin; i < end; i += step) {
      Vec<A, 4> four = {};
      if (i < size && first + slot < present)
        value(first + slot, i, &four.value[0], &four.value[1]);
      if (samples == 4) {
        *to = four.value[0];
      } else if (samples == 2) {
        *reinterpret_cast<Vec<A, 2>*>(to) = {{four.value[0], four.value[1]}};
      } else {
        *reinterpret_cast<Vec<A, 4>*>(to) = four;
      }
      to += step;
    }
    rows += kBlockSide * kInputRow<A>;
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
  bool whole;  // blocks are whole, and their rows vectors

  CBAM_DEVICE Weights(const A* data, int64_t outputs, int64_t inner)
      : data(data), outputs(outputs), inner(inner) {
    whole = outputs % kBlockSide == 0 && inner % kBlockSide == 0 &&
            reinterpret_cast<uintptr_t>(data) % (kBlockSide * sizeof(A)) == 0;
  }
};

// The weights of four outputs at four inner indices, block[inner][output]; 0 where there are none.
template <bool kInnerFirst, typename A>
CBAM_DEVICE void LoadBlock(const Weights<A>& weights, int64_t output, int64_t i,
                           A (&block)[kBlockSide][kBlockSide]) {
  const int64_t rows = kInnerFirst ? weights.outputs : weights.inner;
  const int64_t columns = kInnerFirst ? weights.inner : weights.outputs;
  const int64_t row = kInnerFirst ? output : i, column = kInnerFirst ? i : output;
  const A* data = weights.data + row * columns + column;
  CBAM_UNROLL
  for (int k = 0; k < kBlockSide; ++k) {
    Vec<A, kBlockSide> four = {};
    if (weights.whole) {
      four = Load<A, kBlockSide>(data);
    } else {
      CBAM_UNROLL
      for (int j = 0; j < kBlockSide; ++j) {
        if (row + k < rows && column + j < columns) four.value[j] = data[j];
      }
    }
    CBAM_UNROLL
    for (int j = 0; j < kBlockSide; ++j) (kInnerFirst ? block[j][k] : block[k][j]) = four.value[j];
    data += columns;
  }
}

// How the threads share the outputs of a tile of kLanes: by four outputs, by vectors of inputs, and
// the rest by inner indices. Neighbours read neighbouring weights.
template <int kLanes, bool kInnerFirst>
struct Shares {
  static constexpr int kOutputs = kLanes / kBlockSide;
  int inner;

  CBAM_DEVICE Shares(int64_t group_samples, int branches)
      : inner(InnerThreads(kLanes, group_samples, branches)) {}
  CBAM_DEVICE int Thread(int outputs, int vector, int part) const {
    return kInnerFirst ? (vector * kOutputs + outputs) * inner + part
                       : (vector * inner + part) * kOutputs + outputs;
  }
};

// Calls store(s, output, first's sum, second's sum) for the outputs of a tile of kLanes and the
// samples that are there, the sums being those of the branches' value(s, i) weight(output, i) over
// inner indices i from `begin` to before `end`.
template <int kLanes, bool kInnerFirst, typename A, typename Value, typename Store>
CBAM_DEVICE void Products(const Call<A>& call, const Weights<A>& weights, int64_t tile,
                          int64_t begin, int64_t end, int present, int branches, Value value,
                          Store store) {
  using Share = Shares<kLanes, kInnerFirst>;
  const Share shares(call.schedule.group_samples, branches);
  const int samples = 4 / branches;  // of a vector
  const int rest = ThreadIndex() % (Share::kOutputs * shares.inner);
  const int vector = ThreadIndex() / (Share::kOutputs * shares.inner);
  const int part = kInnerFirst ? rest % shares.inner : rest / Share::kOutputs;
  const int outputs = kInnerFirst ? rest / shares.inner : rest % Share::kOutputs;
  const int64_t first_output = tile * kLanes + outputs * kBlockSide;
  A* const shared = Shared<A>();
  const A* const mine = shared + vector * kBlockSide * kInputRow<A>;
  A sums[kBlockSide][4] = {};
  CBAM_NO_UNROLL
  for (int64_t first = begin; first < end; first += kInputs<A>) {
    const int size = static_cast<int>(Smaller(kInputs<A>, end - first));
    FillInputs(shared, size, present, branches,
               [&](int s, int i, A* one, A* other) { value(s, first + i, one, other); });
    Barrier();
    if (samples * vector < present && first_output < weights.outputs) {
      CBAM_NO_UNROLL
      for (int i = part * kBlockSide; i < size; i += shares.inner * kBlockSide) {
        A block[kBlockSide][kBlockSide];
        LoadBlock<kInnerFirst>(weights, first_output, first + i, block);
        CBAM_UNROLL
        for (int k = 0; k < kBlockSide; ++k) {
          const Vec<A, 4> inputs = Load<A, 4>(mine + k * kInputRow<A> + i);
          CBAM_UNROLL
          for (int o = 0; o < kBlockSide; ++o) {
            CBAM_UNROLL
            for (int j = 0; j < 4; ++j) sums[o][j] += inputs.value[j] * block[k][o];
          }
        }
      }
    }
    Barrier();
  }
  // One more than there are threads between what neighbours read.
  constexpr int kRow = kThreads + 1;
  CBAM_UNROLL
  for (int o = 0; o < kBlockSide; ++o) {
    CBAM_UNROLL
    for (int j = 0; j < 4; ++j) shared[(o * 4 + j) * kRow + ThreadIndex()] = sums[o][j];
  }
  Barrier();
  CBAM_NO_UNROLL
  for (int at = ThreadIndex(); at < present * kLanes; at += kThreads) {
    const int s = at / kLanes, lane = at % kLanes;
    if (tile * kLanes + lane >= weights.outputs) continue;
    A result[2] = {A(0), A(0)};
    const A* const parts = shared + (lane % kBlockSide * 4 + s % samples * branches) * kRow;
    CBAM_NO_UNROLL
    for (int r = 0; r < shares.inner; ++r) {
      const A* const of_thread = parts + shares.Thread(lane / kBlockSide, s / samples, r);
      result[0] += of_thread[0];
      if (branches == 2) result[1] += of_thread[kRow];
    }
    store(s, tile * kLanes + lane, result[0], result[1]);
  }
}

// An item that sums over channels is kUnits hidden units at a slice of the channels. Where there are
// several slices their sums are folded by FoldHidden: items that took them all would be few, and
// others wait for them.
struct UnitsAtSlice {
  int64_t tile;
  int64_t slice;
  int64_t begin;
  int64_t end;
};
template <typename A>
CBAM_DEVICE UnitsAtSlice UnitsAt(const Call<A>& call, int64_t index) {
  const int64_t tiles = Quotient(call.hidden + kUnits - 1, kUnits);
  const int64_t slice = Quotient(index, tiles), begin = slice * call.mlp_slice;
  return {index - slice * tiles, slice, begin, Smaller(begin + call.mlp_slice, call.channels)};
}

template <typename A>
CBAM_DEVICE void StoreHidden(const Call<A>& call, int64_t n, int64_t unit, A mean, A maximum) {
  const A bias = call.b0 != nullptr ? call.b0[unit] : A(0);
  A* const hidden = call.hidden_values + n * 2 * call.hidden + unit;
  hidden[0] = call.use_mean ? Relu(mean + bias) : A(0);
  hidden[call.hidden] = call.use_max ? Relu(maximum + bias) : A(0);
}
// The gradient before a ReLU. Multiplied, as in TensorFlow: what is NaN or infinite stays NaN.
template <typename A>
CBAM_DEVICE A Masked(A gradient, A value) {
  return gradient * (value > A(0) ? A(1) : A(0));
}
template <typename A>
CBAM_DEVICE void StoreHiddenGrad(const Call<A>& call, int64_t n, int64_t unit, A mean, A maximum) {
  const int64_t at = n * 2 * call.hidden + unit;
  const A* const hidden = call.hidden_values + at;
  A* const d_hidden = call.d_hidden + at;
  d_hidden[0] = call.use_mean ? Masked(mean, hidden[0]) : A(0);
  d_hidden[call.hidden] =
      call.use_max ? Masked(call.by_branch ? maximum : mean, hidden[call.hidden]) : A(0);
}

// An item is kChunk hidden units of a sample.
template <typename A>
CBAM_DEVICE void FoldHidden(const Call<A>& call, int64_t n, int64_t index, bool gradient) {
  const int64_t end = Smaller((index + 1) * kChunk, call.hidden);
  CBAM_NO_UNROLL
  for (int64_t unit = index * kChunk + ThreadIndex(); unit < end; unit += kThreads) {
    A mean, maximum;
    Fold<false>(call.hidden_slices, n, unit, &mean, &maximum);
    gradient ? StoreHiddenGrad(call, n, unit, mean, maximum)
             : StoreHidden(call, n, unit, mean, maximum);
  }
}

template <typename A>
CBAM_DEVICE void Hidden(const Call<A>& call, int64_t group_index, int64_t index) {
  const Group<A> group(call, group_index);
  const Weights<A> weights(call.w0, call.hidden, call.channels);
  const UnitsAtSlice part = UnitsAt(call, index);
  Products<kUnits, false>(
      call, weights, part.tile, part.begin, part.end, group.present, 2,
      [&](int s, int64_t c, A* mean, A* maximum) {
        const int64_t n = group.first + s;
        Fold<true>(call.channel_source, n, c, mean, maximum);
        if (part.tile == 0 && call.channel_descriptors != nullptr) {
          A* const descriptor = call.channel_descriptors + n * call.channels + c;
          descriptor[0] = call.use_mean ? *mean : A(0);
          descriptor[call.batch * call.channels] = call.use_max ? *maximum : A(0);
        }
      },
      [&](int s, int64_t unit, A mean, A maximum) {
        const int64_t n = group.first + s;
        call.hidden_slices.slices > 1
            ? StoreSlice(call.hidden_slices, n, part.slice, unit, mean, maximum)
            : StoreHidden(call, n, unit, mean, maximum);
      });
}

// The sum of a channel's logits, branch by branch.
template <typename A>
CBAM_DEVICE A LogitByBranches(const Call<A>& call, int64_t n, int64_t c, A bias) {
  A logit = A(0);
  CBAM_NO_UNROLL
  for (int t = 0; t < 2; ++t) {
    const A* const hidden = call.hidden_values + (n * 2 + t) * call.hidden;
    A sum = bias;
    CBAM_NO_UNROLL
    for (int64_t j = 0; j < call.hidden; ++j) sum += hidden[j] * call.w1[j * call.channels + c];
    logit += sum;
  }
  return logit;
}

// An item is kGateChannels channels: the gate, or in backward the logits alone.
template <typename A>
CBAM_DEVICE void Gate(const Call<A>& call, int64_t group_index, int64_t tile, bool logits_only) {
  const Group<A> group(call, group_index);
  const Weights<A> weights(call.w1, call.channels, call.hidden);
  Products<kGateChannels, false>(
      call, weights, tile, 0, call.hidden, group.present, OuterBranches(call),
      [&](int s, int64_t j, A* mean, A* maximum) {
        ReadPair(call.hidden_values, call.hidden, group.first + s, j, mean, maximum);
        if (!call.by_branch) *mean += *maximum;  // what is not used is 0
      },
      [&](int s, int64_t c, A mean, A maximum) {
        const int64_t n = group.first + s;
        const A bias = call.b1 != nullptr ? call.b1[c] : A(0);
        mean += bias;
        maximum += bias;
        if (logits_only) {
          A* const logits = call.logits + n * OuterBranches(call) * call.channels + c;
          logits[0] = mean;
          if (call.by_branch) logits[call.channels] = maximum;
          return;
        }
        if (call.mlp_relu) {
          mean = Relu(mean);
          maximum = Relu(maximum);
        }
        if (call.by_branch && !call.sum_of_gates) mean += maximum;
        if (call.sum_of_logits) {
          mean += bias;
          // An infinite weight times 0 is NaN, and with the branches' sum need not be.
          if (!IsFinite(mean)) mean = LogitByBranches(call, n, c, bias);
        }
        A gate = Sigmoid(mean);
        if (call.sum_of_gates) gate += Sigmoid(maximum);
        call.channel_gate[n * call.channels + c] = gate;
      });
}

template <typename A>
CBAM_DEVICE void HiddenGrad(const Call<A>& call, int64_t group_index, int64_t index) {
  const Group<A> group(call, group_index);
  const Weights<A> weights(call.w1, call.hidden, call.channels);
  const UnitsAtSlice part = UnitsAt(call, index);
  const int branches = OuterBranches(call);
  Products<kUnits, true>(
      call, weights, part.tile, part.begin, part.end, group.present, branches,
      [&](int s, int64_t c, A* mean, A* maximum) {
        const int64_t n = group.first + s, at = n * call.channels + c;
        A d_gate, count;
        Fold<false>(call.channel_pass, n, c, &d_gate, &count);
        if (call.d_channel_gate != nullptr) d_gate += call.d_channel_gate[at];
        const A gate = call.channel_gate[at];
        const int64_t to = n * branches * call.channels + c;
        const auto through = [&](int64_t branch) {
          A d_logit = d_gate * gate * (A(1) - gate);
          if (call.logits == nullptr) return d_logit;
          const A logit = call.logits[to + branch * call.channels];
          if (call.sum_of_gates) d_logit = d_gate * Sigmoid(logit) * Sigmoid(-logit);
          return call.mlp_relu ? Masked(d_logit, logit) : d_logit;
        };
        *mean = through(0);
        if (call.by_branch) *maximum = through(1);
        if (part.tile != 0) return;
        call.d_logits[to] = *mean;
        if (call.by_branch) call.d_logits[to + call.channels] = *maximum;
      },
      [&](int s, int64_t unit, A mean, A maximum) {
        const int64_t n = group.first + s;
        call.hidden_slices.slices > 1
            ? StoreSlice(call.hidden_slices, n, part.slice, unit, mean, maximum)
            : StoreHiddenGrad(call, n, unit, mean, maximum);
      });
}

// An item is kGateChannels channels.
template <typename A>
CBAM_DEVICE void ChannelSides(const Call<A>& call, int64_t group_index, int64_t tile) {
  const Group<A> group(call, group_index);
  const Weights<A> weights(call.w0, call.channels, call.hidden);
  Products<kGateChannels, true>(
      call, weights, tile, 0, call.hidden, group.present, 2,
      [&](int s, int64_t j, A* mean, A* maximum) {
        ReadPair(call.d_hidden, call.hidden, group.first + s, j, mean, maximum);
      },
      [&](int s, int64_t c, A d_mean, A d_max) {
        const int64_t n = group.first + s, at = n * call.channels + c;
        A d_gate, count;
        Fold<false>(call.channel_pass, n, c, &d_gate, &count);
        StoreSide(call.channel_sides, n, c,
                  MakeSide(call.channel_gate[at], call.use_mean ? d_mean : A(0),
                           static_cast<A>(call.positions), call.use_max, d_max, count,
                           call.channel_maximum[at]));
      });
}

// shared[i * kWidth + j] = value(i, column + j) for `terms` rows of `size` values, 0 beyond their
// end.
template <int kWidth, typename A, typename Value>
CBAM_DEVICE void FillTerms(A* shared, int terms, int64_t column, int64_t size, Value value) {
  const int64_t c = column + ThreadIndex() % kWidth;
  CBAM_NO_UNROLL
  for (int i = ThreadIndex() / kWidth; i < terms; i += kThreads / kWidth)
    shared[i * kWidth + ThreadIndex() % kWidth] = c < size ? value(i, c) : A(0);
}

// out[a, b] = sum over k of left[k, a] right[k, b], and bias[b] = sum over k of right[k, b], k over
// samples and descriptors. An item is kOuterLeft x kOuterRight of them, 4 x 4 for each thread.
template <typename A>
CBAM_DEVICE void WeightGradient(const Call<A>& call, int64_t tile, bool of_w0) {
  constexpr int kTerms = 128 / static_cast<int>(sizeof(A));
  const int64_t left_size = of_w0 ? call.channels : call.hidden;
  const int64_t right_size = of_w0 ? call.hidden : call.channels;
  A* const out = of_w0 ? call.dw0 : call.dw1;
  A* const bias = of_w0 ? call.db0 : call.db1;
  const int64_t tiles = (right_size + kOuterRight - 1) / kOuterRight;
  const int64_t first_a = Quotient(tile, tiles) * kOuterLeft;
  const int64_t first_b = Remainder(tile, tiles) * kOuterRight;
  const int a = ThreadIndex() / 16 * 4, b = ThreadIndex() % 16 * 4;
  A* const left = Shared<A>();
  A* const right = left + kTerms * kOuterLeft;
  const bool sums_bias = first_a == 0 && ThreadIndex() < kOuterRight && bias != nullptr;
  // Where there is one dl, the hidden units are added. If it is of a sum of logits, unless that gives
  // what is not finite: an infinite dl times 0 is NaN.
  CBAM_NO_UNROLL
  for (int branches = of_w0 ? 2 : OuterBranches(call);; branches = 2) {
    const int64_t terms = branches * call.batch;
    A sums[4][4] = {}, bias_sum = A(0);
    CBAM_NO_UNROLL
    for (int64_t first = 0; first < terms; first += kTerms) {
      const int size = static_cast<int>(Smaller(kTerms, terms - first));
      // Descriptors lie [2, N, C], all else [N, branches, ...].
      FillTerms<kOuterLeft>(left, size, first_a, left_size, [&](int i, int64_t column) {
        const int64_t k = first + i;
        if (of_w0) {
          return call.channel_source.first[(k % 2 * call.batch + k / 2) * left_size + column];
        }
        if (branches == 2) return call.hidden_values[k * left_size + column];
        A mean, maximum;
        ReadPair(call.hidden_values, left_size, k, column, &mean, &maximum);
        return mean + maximum;
      });
      FillTerms<kOuterRight>(right, size, first_b, right_size, [&](int i, int64_t column) {
        const int64_t k = first + i;
        if (of_w0) return call.d_hidden[k * right_size + column];
        return call.d_logits[(call.by_branch ? k : k / branches) * right_size + column];
      });
      Barrier();
      CBAM_UNROLL_4
      for (int k = 0; k < size; ++k) {
        const Vec<A, 4> of_left = Load<A, 4>(left + k * kOuterLeft + a);
        const Vec<A, 4> of_right = Load<A, 4>(right + k * kOuterRight + b);
        CBAM_UNROLL
        for (int i = 0; i < 4; ++i) {
          CBAM_UNROLL
          for (int j = 0; j < 4; ++j) sums[i][j] += of_left.value[i] * of_right.value[j];
        }
      }
      if (sums_bias) {
        CBAM_NO_UNROLL
        for (int k = 0; k < size; ++k) bias_sum += right[k * kOuterRight + ThreadIndex()];
      }
      Barrier();
    }
    const bool is_of_sum = branches == 1 && call.sum_of_logits;
    if (is_of_sum) {
      A differences = A(0);  // 0, or NaN
      CBAM_UNROLL
      for (int i = 0; i < 4; ++i) {
        CBAM_UNROLL
        for (int j = 0; j < 4; ++j) differences += sums[i][j] - sums[i][j];
      }
      if (BlockSum(differences, right + kTerms * kOuterRight) != A(0)) continue;
    }
    CBAM_UNROLL
    for (int i = 0; i < 4; ++i) {
      CBAM_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (first_a + a + i < left_size && first_b + b + j < right_size)
          out[(first_a + a + i) * right_size + first_b + b + j] = sums[i][j];
      }
    }
    if (sums_bias && first_b + ThreadIndex() < right_size)
      bias[first_b + ThreadIndex()] = is_of_sum ? 2 * bias_sum : bias_sum;
    return;
  }
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_MLP_CUH_
