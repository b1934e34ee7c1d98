// Random calls (random_calls.h) of the CUDA kernels for float32 maps as they run on a CPU, for
// AddressSanitizer and ThreadSanitizer, and for faults that are put into the sources.
//
//   cuda_on_cpu_check [count [first [failures]]]    default 40 1 20: after so many it stops
//
// Each call runs twice, in other orders of blocks and threads: once with one block at a time, the
// worst that can happen to who waits for others, once with several at once.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "core/contract.h"
#include "core/cuda/kernels.h"
#include "testing/cuda_on_cpu.h"
#include "testing/random_calls.h"

namespace cbam_ops {
namespace {

// A way of running a call is the number of blocks at a time, and the seed of the schedule.
struct CudaKernels {
  static constexpr DataType kTypes[] = {DataType::kFloat32};

  template <typename Pick>
  static void Choose(Pick pick) {
    seed = 1 + pick(1000);
    cuda_on_cpu::PretendedDevice().multiprocessors = 1 + pick(2);
  }
  template <typename Pick>
  static std::pair<int, int> Ways(Pick pick) {
    return {1, 2 + pick(3)};
  }
  static std::string Name() { return "CUDA"; }
  static constexpr bool kTakesOver = false;
  // Derivatives of sigmoids are g (1 - g), which has few digits where g is near 1
  // (docs/numerics.md).
  static bool Holds(Fill fill) { return fill != Fill::kSaturated; }

  template <typename Args>
  static size_t WorkspaceBytes(const Problem& problem, int /*blocks*/) {
    return cuda::WorkspaceBytes<Args>(problem);
  }
  template <typename Args>
  static Status Run(const Problem& problem, const Args& args, void* workspace, int blocks) {
    cuda_on_cpu::PretendedDevice().resident_blocks = blocks;
    cuda_on_cpu::SetSchedule(static_cast<uint64_t>(seed + blocks));
    return cuda::Run(problem, args, workspace, nullptr);
  }

  static inline int seed = 0;
};

}  // namespace
}  // namespace cbam_ops

int main(int argc, char** argv) {
  using Call = cbam_ops::RandomCall<cbam_ops::CudaKernels>;
  // A deadlock is reported, and counts.
  cbam_ops::cuda_on_cpu::SetFailureHandler([](const char* message) {
    std::printf("%s\n", message);
    std::fflush(stdout);
    std::_Exit(2);
  });
  const uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 40;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const int most = argc > 3 ? std::atoi(argv[3]) : 20;
  for (uint64_t number = first; number < first + count && cbam_ops::failures < most; ++number) {
    Call(number).Check();
  }
  std::printf("%lld gradients compared, errors up to %.2f of what is allowed\n%d failures\n",
              static_cast<long long>(Call::compared), Call::strain, cbam_ops::failures);
  return cbam_ops::failures > 0 ? 1 : 0;
}
