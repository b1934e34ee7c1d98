// The ops in double and without any cleverness: what the tests in C++ hold kernels against, those
// for CPUs (core_test.cc) and the CUDA ones that run on a CPU (cuda_on_cpu_check.cc).
#ifndef CBAM_OPS_TESTING_DEFINITION_H_
#define CBAM_OPS_TESTING_DEFINITION_H_

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/contract.h"

namespace cbam_ops {

// A value, its derivative along a direction that the inputs' tangents give, and for both how far an
// evaluation in any order may be from them, in roundings of the type it is done in (to first
// order).
struct Number {
  Number(double exact = 0) : value(exact) {}  // NOLINT: implicit
  double value, tangent = 0, error = 0, tangent_error = 0;
};

// Of float, the narrower of the types that are computed in; below the first, errors are not
// relative.
constexpr double kSmallestNormal = FLT_MIN, kLargestRounding = FLT_EPSILON / 2;

inline Number operator*(const Number& a, const Number& b) {
  const auto size = [](double x, double y) { return std::fabs(x * y); };
  Number r(a.value * b.value);
  r.tangent = a.tangent * b.value + a.value * b.tangent;
  r.error = size(a.value, b.error) + size(a.error, b.value) + size(a.value, b.value);
  r.tangent_error = size(a.tangent, b.error) + size(a.tangent_error, b.value) +
                    size(a.value, b.tangent_error) + size(a.error, b.tangent) +
                    size(a.tangent, b.value) + size(a.value, b.tangent) + kSmallestNormal;
  r.error += size(a.error, b.error) * kLargestRounding + kSmallestNormal;
  return r;
}

// A sum, itself exact, whose rounding errors would be as large as its largest terms.
class Sum {
 public:
  void Add(const Number& n) {
    value_ += n.value;
    tangent_ += n.tangent;
    error_ += n.error + std::fabs(n.value);
    tangent_error_ += n.tangent_error + std::fabs(n.tangent);
  }
  Number Total() const {
    Number total(static_cast<double>(value_));
    total.tangent = static_cast<double>(tangent_);
    total.error = error_;
    total.tangent_error = tangent_error_;
    return total;
  }

 private:
  long double value_ = 0, tangent_ = 0;
  double error_ = 0, tangent_error_ = 0;
};

inline Number operator+(const Number& a, const Number& b) {
  Sum sum;
  sum.Add(a);
  sum.Add(b);
  return sum.Total();
}
inline Number operator-(const Number& a, const Number& b) { return a + Number(-1) * b; }

// f(n) from f, f' and f'' at its value.
inline Number Apply(const Number& n, double f, double first, double second) {
  Number r(f);
  r.tangent = first * n.tangent;
  r.error = std::fabs(first) * n.error + std::fabs(f) + kSmallestNormal;
  r.tangent_error = std::fabs(first) * n.tangent_error + std::fabs(second * n.tangent) * n.error +
                    std::fabs(r.tangent) + kSmallestNormal;
  return r;
}

using Numbers = std::map<std::string, std::vector<Number>>;

class Definition {
 public:
  // `inputs` are those of the op, by the names of the table. What a derivative depends on in steps
  // is decided by the results under test where they are given: `y` by where the last ReLU cuts,
  // `channel_gate` by which channels of x * channel_gate are equal maxima. A product has the
  // `compute_type`.
  Definition(const Problem& problem, const Numbers& inputs, const std::vector<double>& y = {},
             const std::vector<double>& channel_gate = {},
             DataType compute_type = DataType::kFloat64)
      : p_(problem),
        inputs_(inputs),
        y_(y),
        tie_gate_(channel_gate),
        narrow_(compute_type == DataType::kFloat32) {
    if (HasChannelGate(p_) || p_.module == Module::kChannelPool) ChannelPool();
    if (HasChannelGate(p_)) ChannelGate();
    if (HasSpatialGate(p_) || p_.module == Module::kSpatialPool) SpatialPool();
    if (HasSpatialGate(p_)) SpatialGate();
    if (HasChannelGate(p_) || HasSpatialGate(p_)) Map();
  }

  // By the names of the table.
  const Numbers& outputs() const { return outputs_; }
  // False where rounding errors decide more than last places: a ReLU in the MLP cuts, or does not,
  // or a logit is lost in them.
  bool IsClear() const { return clear_; }

 private:
  static size_t Index(int64_t i) { return static_cast<size_t>(i); }
  size_t At(int64_t n, int64_t position, int64_t channel) const {
    return Index(p_.layout == Layout::kNHWC ? (n * positions_ + position) * p_.channels + channel
                                            : (n * p_.channels + channel) * positions_ + position);
  }
  bool Has(const char* name) const { return inputs_.count(name) > 0; }
  const Number& Input(const char* name, size_t i) const { return inputs_.at(name)[i]; }
  double Roundings(double error) const {
    return error * (narrow_ ? double{FLT_EPSILON} : DBL_EPSILON) * 16;
  }

  Number Sigmoid(const Number& z) {
    if (Roundings(z.error) > 0.1) clear_ = false;
    const double e = std::exp(-std::fabs(z.value)), gate = (z.value < 0 ? e : 1) / (1 + e);
    const double slope = e / ((1 + e) * (1 + e));
    Number r = Apply(z, std::isnan(z.value) ? z.value : gate, slope, slope * (1 - 2 * gate));
    // Far out kernels give 0 for what is less than a normal number.
    r.error += kSmallestNormal / kLargestRounding;
    r.tangent_error += std::fabs(z.tangent) * kSmallestNormal / kLargestRounding;
    return r;
  }
  Number Relu(const Number& v) {
    if (v.value != 0 && std::fabs(v.value) <= Roundings(v.error)) clear_ = false;
    return v.value > 0 || std::isnan(v.value) ? v : Number(0);
  }
  // The maximum of `values`, as the mean of those that attain it by `keys`: so falls its gradient.
  static Number Maximum(const std::vector<Number>& values, const std::vector<double>& keys) {
    double greatest = -INFINITY;
    for (const double key : keys) greatest = key > greatest || std::isnan(key) ? key : greatest;
    Sum sum;
    double ties = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] != greatest) continue;
      sum.Add(values[i]);
      ++ties;
    }
    return ties > 0 ? sum.Total() * Number(1 / ties) : Number(greatest);
  }

  void ChannelPool() {
    for (int64_t n = 0; n < p_.batch; ++n) {
      for (int64_t c = 0; c < p_.channels; ++c) {
        Sum sum;
        std::vector<Number> values;
        std::vector<double> keys;
        for (int64_t q = 0; q < positions_; ++q) {
          values.push_back(Input("x", At(n, q, c)));
          keys.push_back(values.back().value);
          sum.Add(values.back());
        }
        channel_mean_.push_back(sum.Total() * Number(1.0 / static_cast<double>(positions_)));
        channel_maximum_.push_back(Maximum(values, keys));
      }
    }
    if (p_.module == Module::kChannelPool) {
      outputs_["mean"] = channel_mean_;
      outputs_["maximum"] = channel_maximum_;
    }
  }

  void ChannelGate() {
    std::vector<Number>& descriptors = outputs_["channel_descriptors"];
    std::vector<std::vector<Number>> branches;
    for (const bool is_mean : {true, false}) {
      std::vector<Number> pooled = is_mean ? channel_mean_ : channel_maximum_;
      const bool used = is_mean ? UsesMean(p_.pooling) : UsesMax(p_.pooling);
      if (!used) pooled.assign(pooled.size(), Number(0));
      descriptors.insert(descriptors.end(), pooled.begin(), pooled.end());
      if (used) branches.push_back(Dense(pooled, p_.channels, "w0", "b0", p_.hidden, true));
    }
    const bool relu = p_.mlp_activation == Activation::kRelu;
    if (p_.mlp_merge == MlpMerge::kHidden) Merge(&branches);
    for (auto& branch : branches) branch = Dense(branch, p_.hidden, "w1", "b1", p_.channels, relu);
    if (p_.mlp_merge == MlpMerge::kLogits) Merge(&branches);
    for (auto& branch : branches) {
      for (Number& v : branch) v = Sigmoid(v);
    }
    Merge(&branches);
    outputs_["channel_gate"] = branches[0];
  }
  static void Merge(std::vector<std::vector<Number>>* branches) {
    for (; branches->size() > 1; branches->pop_back()) {
      for (size_t i = 0; i < branches->back().size(); ++i)
        branches->front()[i] = branches->front()[i] + branches->back()[i];
    }
  }
  // [N, inputs] -> [N, outputs]
  std::vector<Number> Dense(const std::vector<Number>& values, int64_t inputs, const char* weights,
                            const char* biases, int64_t outputs, bool relu) {
    std::vector<Number> results;
    for (int64_t n = 0; n < p_.batch; ++n) {
      for (int64_t j = 0; j < outputs; ++j) {
        Sum sum;
        if (Has(biases)) sum.Add(Input(biases, Index(j)));
        for (int64_t i = 0; i < inputs; ++i)
          sum.Add(values[Index(n * inputs + i)] * Input(weights, Index(i * outputs + j)));
        results.push_back(relu ? Relu(sum.Total()) : sum.Total());
      }
    }
    return results;
  }
  void SpatialPool() {
    const bool gated = p_.module == Module::kChannelFirst;
    for (int64_t n = 0; n < p_.batch; ++n) {
      for (int64_t q = 0; q < positions_; ++q) {
        Sum sum;
        std::vector<Number> values;
        std::vector<double> keys;
        for (int64_t c = 0; c < p_.channels; ++c) {
          const Number& x = Input("x", At(n, q, c));
          const size_t i = Index(n * p_.channels + c);
          values.push_back(gated ? x * outputs_["channel_gate"][i] : x);
          const double gate = !gated              ? 1
                              : tie_gate_.empty() ? outputs_["channel_gate"][i].value
                                                  : tie_gate_[i];
          keys.push_back(narrow_ ? static_cast<float>(x.value) * static_cast<float>(gate)
                                 : x.value * gate);
          sum.Add(values.back());
        }
        spatial_mean_.push_back(sum.Total() * Number(1.0 / static_cast<double>(p_.channels)));
        spatial_maximum_.push_back(Maximum(values, keys));
      }
    }
    const bool pool = p_.module == Module::kSpatialPool;
    std::vector<Number>& descriptors = outputs_[pool ? "descriptors" : "spatial_descriptors"];
    descriptors.resize(2 * spatial_mean_.size());
    for (int64_t i = 0; i < p_.batch * positions_; ++i) {
      const int64_t n = i / positions_, q = i % positions_;
      const bool last = pool && p_.layout == Layout::kNHWC;  // the two are neighbours
      descriptors[Index(last ? 2 * i : 2 * n * positions_ + q)] = spatial_mean_[Index(i)];
      descriptors[Index(last ? 2 * i + 1 : (2 * n + 1) * positions_ + q)] =
          spatial_maximum_[Index(i)];
    }
  }

  void SpatialGate() {
    std::vector<Number> logits;
    for (int64_t n = 0; n < p_.batch; ++n) {
      for (int64_t q = 0; q < positions_; ++q) logits.push_back(Convolution(n, q));
    }
    if (p_.batch_norm) Normalize(&logits);
    for (const Number& z : logits)
      outputs_["spatial_gate"].push_back(Sigmoid(Has("bias") ? z + Input("bias", 0) : z));
  }
  Number Convolution(int64_t n, int64_t position) const {
    const int64_t back = p_.kernel_depth / 2, down = p_.kernel_height / 2,
                  right = p_.kernel_width / 2, area = p_.height * p_.width;
    Sum sum;
    for (int64_t a = -back; a <= back; ++a) {
      const int64_t slice = position / area + a;
      if (slice < 0 || slice >= p_.depth) continue;
      for (int64_t b = -down; b <= down; ++b) {
        const int64_t row = position % area / p_.width + b;
        if (row < 0 || row >= p_.height) continue;
        for (int64_t c = -right; c <= right; ++c) {
          const int64_t column = position % p_.width + c;
          if (column < 0 || column >= p_.width) continue;
          const int64_t tap_row = (a + back) * p_.kernel_height + b + down;
          const int64_t tap = (tap_row * p_.kernel_width + c + right) * 2;
          const size_t other = Index(n * positions_ + slice * area + row * p_.width + column);
          sum.Add(spatial_mean_[other] * Input("kernel", Index(tap)));
          sum.Add(spatial_maximum_[other] * Input("kernel", Index(tap + 1)));
        }
      }
    }
    return sum.Total();
  }
  void Normalize(std::vector<Number>* logits) {
    const Number share(logits->empty() ? 0 : 1 / static_cast<double>(logits->size()));
    Sum total, squares;
    for (const Number& z : *logits) total.Add(z);
    const Number mean = total.Total() * share;
    for (Number& z : *logits) {
      z = z - mean;
      squares.Add(z * z);
    }
    const Number variance = squares.Total() * share, v = variance + Number(p_.epsilon);
    if (Roundings(v.error) > 0.1 * v.value) clear_ = false;
    const double inverse = 1 / std::sqrt(v.value);
    const Number scale = Input("gamma", 0) * Apply(v, inverse, -0.5 * inverse / v.value,
                                                   0.75 * inverse / (v.value * v.value));
    for (Number& z : *logits) z = z * scale;
    outputs_["batch_statistics"] = {mean, variance};
  }

  void Map() {
    std::vector<Number>& y = outputs_["y"];
    y.resize(Index(p_.batch * positions_ * p_.channels));
    for (int64_t n = 0; n < p_.batch; ++n) {
      for (int64_t q = 0; q < positions_; ++q) {
        for (int64_t c = 0; c < p_.channels; ++c) {
          const size_t i = At(n, q, c);
          Number v = Input("x", i);
          if (HasChannelGate(p_)) v = v * outputs_["channel_gate"][Index(n * p_.channels + c)];
          if (HasSpatialGate(p_)) v = v * outputs_["spatial_gate"][Index(n * positions_ + q)];
          if (Has("residual")) v = v + Input("residual", i);
          if (p_.activation == Activation::kRelu) {
            if (v.value <= 0) v.value = 0;
            if (!((y_.empty() ? v.value : y_[i]) > 0)) v.tangent = v.tangent_error = 0;
          }
          y[i] = v;
        }
      }
    }
  }

  const Problem p_;
  const Numbers& inputs_;
  const std::vector<double> y_, tie_gate_;
  const bool narrow_;
  const int64_t positions_ = p_.depth * p_.height * p_.width;
  std::vector<Number> channel_mean_, channel_maximum_, spatial_mean_, spatial_maximum_;
  Numbers outputs_;
  bool clear_ = true;
};

}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_DEFINITION_H_
