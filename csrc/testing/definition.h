// The module in double and without any cleverness: what the tests in C++ hold kernels against, those
// for CPUs (core_test.cc) and the CUDA ones that run on a CPU (cuda_on_cpu_check.cc).
#ifndef CBAM_OPS_TESTING_DEFINITION_H_
#define CBAM_OPS_TESTING_DEFINITION_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/contract.h"

namespace cbam_ops {

// y of a problem, written naively. `t` has the inputs of the op as vectors of double, by their names,
// the residual among them.
template <typename Tensors>
std::vector<double> Define(const Problem& p, const Tensors& t) {
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  const int64_t n = p.batch, positions = p.height * p.width, c = p.channels, r = p.kernel_size / 2;
  const auto at = [&](int64_t i, int64_t position, int64_t channel) {
    return static_cast<size_t>(p.layout == Layout::kNHWC
                                   ? (i * positions + position) * c + channel
                                   : (i * c + channel) * positions + position);
  };
  const auto index = [](int64_t i) { return static_cast<size_t>(i); };
  std::vector<double> gate_c(index(n * c), 1.0), logits(index(n * positions), 0.0);
  if (HasChannelGate(p)) {
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> sum(index(c), 0.0);
      for (const Pooling pool : {Pooling::kAvg, Pooling::kMax}) {
        if (p.pooling != Pooling::kAvgMax && p.pooling != pool) continue;
        std::vector<double> pooled(index(c));
        for (int64_t j = 0; j < c; ++j) {
          double mean = 0, maximum = -INFINITY;
          for (int64_t q = 0; q < positions; ++q) {
            mean += t.x[at(i, q, j)] / static_cast<double>(positions);
            maximum = std::fmax(maximum, t.x[at(i, q, j)]);
          }
          pooled[index(j)] = pool == Pooling::kAvg ? mean : maximum;
        }
        std::vector<double> branch = t.b1;
        for (int64_t h = 0; h < p.hidden; ++h) {
          double hidden = t.b0[index(h)];
          for (int64_t j = 0; j < c; ++j) {
            hidden += pooled[index(j)] * t.w0[index(j * p.hidden + h)];
          }
          for (int64_t j = 0; j < c; ++j) {
            branch[index(j)] += std::fmax(hidden, 0) * t.w1[index(h * c + j)];
          }
        }
        for (int64_t j = 0; j < c; ++j) {
          const double value = branch[index(j)];
          sum[index(j)] += p.mlp_activation == Activation::kRelu ? std::fmax(value, 0) : value;
        }
      }
      for (int64_t j = 0; j < c; ++j) gate_c[index(i * c + j)] = sigmoid(sum[index(j)]);
    }
  }
  if (HasSpatialGate(p)) {
    std::vector<double> descriptors;  // mean and maximum over channels, per position
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t q = 0; q < positions; ++q) {
        double mean = 0, maximum = -INFINITY;
        for (int64_t j = 0; j < c; ++j) {
          const double gate = p.module == Module::kChannelFirst ? gate_c[index(i * c + j)] : 1.0;
          const double u = t.x[at(i, q, j)] * gate;
          mean += u / static_cast<double>(c);
          maximum = std::fmax(maximum, u);
        }
        descriptors.insert(descriptors.end(), {mean, maximum});
      }
    }
    double total = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t q = 0; q < positions; ++q) {
        double z = 0;
        for (int64_t a = -r; a <= r; ++a) {
          for (int64_t b = -r; b <= r; ++b) {
            const int64_t row = q / p.width + a, column = q % p.width + b;
            if (row < 0 || row >= p.height || column < 0 || column >= p.width) continue;
            const int64_t tap = ((a + r) * p.kernel_size + b + r) * 2;
            const int64_t other = (i * positions + row * p.width + column) * 2;
            z += descriptors[index(other)] * t.kernel[index(tap)] +
                 descriptors[index(other + 1)] * t.kernel[index(tap + 1)];
          }
        }
        logits[index(i * positions + q)] = z;
        total += z;
      }
    }
    const auto count = static_cast<double>(n * positions);
    for (const double z : logits) squares += (z - total / count) * (z - total / count);
    for (double& z : logits) {
      if (p.batch_norm) {
        z = t.gamma[0] * (z - total / count) / std::sqrt(squares / count + p.epsilon);
      }
      z = sigmoid(z + t.bias[0]);
    }
  }
  std::vector<double> y(t.x.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t q = 0; q < positions; ++q) {
      for (int64_t j = 0; j < c; ++j) {
        double value = t.x[at(i, q, j)] * gate_c[index(i * c + j)];
        if (HasSpatialGate(p)) value *= logits[index(i * positions + q)];
        value += t.residual[at(i, q, j)];
        y[at(i, q, j)] = p.activation == Activation::kRelu ? std::fmax(value, 0) : value;
      }
    }
  }
  return y;
}

}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_DEFINITION_H_
