// Entry points of the CPU kernels and the choice of instruction set.
#include "core/cpu/kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "core/cpu/backward.h"
#include "core/cpu/forward.h"
#include "core/cpu/pools.h"

namespace cbam_ops {
namespace cpu {
namespace {

constexpr InstructionSet kInstructionSets[] = {InstructionSet::kBaseline, InstructionSet::kAvx2,
                                               InstructionSet::kAvx512};

InstructionSet BestUpTo(InstructionSet highest) {
  InstructionSet best = InstructionSet::kBaseline;
  for (const InstructionSet instruction_set : kInstructionSets) {
    if (instruction_set <= highest && IsAvailable(instruction_set)) best = instruction_set;
  }
  return best;
}

// The best available set that is not above what the environment asks for; an unknown name asks for
// nothing.
InstructionSet Initial() {
  const char* wanted = std::getenv("CBAM_OPS_INSTRUCTION_SET");
  for (const InstructionSet instruction_set : kInstructionSets) {
    if (wanted != nullptr && std::strcmp(wanted, Name(instruction_set)) == 0) {
      return BestUpTo(instruction_set);
    }
  }
  return BestUpTo(InstructionSet::kAvx512);
}

std::atomic<InstructionSet>& Active() {
  static std::atomic<InstructionSet> active{Initial()};
  return active;
}

// Calls body(Kernels<A>) with the passes for the map type and the active instruction set.
template <typename Body>
auto WithKernels(DataType dtype, const Body& body) {
#define CBAM_LEVEL_KERNELS(level)                                                              \
  switch (dtype) {                                                                             \
    case DataType::kFloat32:                                                                   \
      return body(                                                                             \
          Kernels<float>{&level::kMapFloat32, &level::kDenseFloat32, &level::kDenseFloat64});  \
    case DataType::kFloat16:                                                                   \
      return body(                                                                             \
          Kernels<float>{&level::kMapFloat16, &level::kDenseFloat32, &level::kDenseFloat64});  \
    case DataType::kBFloat16:                                                                  \
      return body(                                                                             \
          Kernels<float>{&level::kMapBFloat16, &level::kDenseFloat32, &level::kDenseFloat64}); \
    case DataType::kFloat64:                                                                   \
      return body(                                                                             \
          Kernels<double>{&level::kMapFloat64, &level::kDenseFloat64, &level::kDenseFloat64}); \
  }
  switch (ActiveInstructionSet()) {
    case InstructionSet::kAvx512:
#if defined(CBAM_HAVE_AVX512)
      CBAM_LEVEL_KERNELS(avx512)
#endif
      break;
    case InstructionSet::kAvx2:
#if defined(CBAM_HAVE_AVX2)
      CBAM_LEVEL_KERNELS(avx2)
#endif
      break;
    case InstructionSet::kBaseline:
      break;
  }
  CBAM_LEVEL_KERNELS(baseline)
#undef CBAM_LEVEL_KERNELS
  return body(
      Kernels<float>{&baseline::kMapFloat32, &baseline::kDenseFloat32, &baseline::kDenseFloat64});
}

template <typename A>
A TypeOf(const Kernels<A>&);

// Whether a forward pass takes no longer than until another thread has begun to help: some 40
// microseconds where it sleeps. The gradient takes three times as long, but such a call's threads
// would share each of its many loops, and meet after each.
bool IsSmall(const Problem& problem) {
  constexpr double kOperations = 1.2e6;
  const auto product = [](std::initializer_list<int64_t> sizes) {
    double all = 1;
    for (const int64_t size : sizes) all *= static_cast<double>(size);
    return all;
  };
  const double positions = product({problem.depth, problem.height, problem.width});
  double operations = 8 * positions * static_cast<double>(problem.channels);
  if (HasSpatialGate(problem)) {
    operations += 2 * positions *
                  product({problem.kernel_depth, problem.kernel_height, problem.kernel_width});
  }
  if (HasChannelGate(problem)) operations += 4 * product({problem.channels, problem.hidden});
  return static_cast<double>(problem.batch) * operations < kOperations;
}

// Calls body(pipeline) with the pipeline of the problem.
template <typename Args, typename Body>
void WithPipeline(const Problem& problem, void* workspace, const Parallel& lent, const Body& body) {
  const Parallel parallel = IsSmall(problem) ? Parallel{} : lent;
  WithKernels(problem.dtype, [&](const auto& kernels) {
    using A = decltype(TypeOf(kernels));
    decltype(PipelineOf<A>(Args())) pipeline(problem, kernels, parallel, workspace);
    body(pipeline);
  });
}

}  // namespace

bool IsAvailable(InstructionSet instruction_set) {
  switch (instruction_set) {
    case InstructionSet::kBaseline:
      return true;
    case InstructionSet::kAvx2:
#if defined(CBAM_HAVE_AVX2)
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case InstructionSet::kAvx512:
#if defined(CBAM_HAVE_AVX512)
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
  }
  return false;
}

const char* Name(InstructionSet instruction_set) {
  switch (instruction_set) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kBaseline:
      break;
  }
  return "baseline";
}

InstructionSet ActiveInstructionSet() { return Active().load(std::memory_order_relaxed); }

bool SetInstructionSet(InstructionSet instruction_set) {
  if (!IsAvailable(instruction_set)) return false;
  Active().store(instruction_set, std::memory_order_relaxed);
  return true;
}

template <typename Args>
size_t WorkspaceBytes(const Problem& problem, const Parallel& parallel) {
  size_t bytes = 0;
  WithPipeline<Args>(problem, nullptr, parallel,
                     [&](const auto& pipeline) { bytes = pipeline.workspace_bytes(); });
  return bytes;
}

template <typename Args>
Status Run(const Problem& problem, const Args& args, void* workspace, const Parallel& parallel) {
  const Status status = CheckProblem(problem);
  if (status.ok()) {
    WithPipeline<Args>(problem, workspace, parallel, [&](auto& pipeline) { pipeline.Run(args); });
  }
  return status;
}

#define CBAM_OPS_INSTANTIATE(Args)                                       \
  template size_t WorkspaceBytes<Args>(const Problem&, const Parallel&); \
  template Status Run(const Problem&, const Args&, void*, const Parallel&);
CBAM_OPS_FOR_EACH_ARGS(CBAM_OPS_INSTANTIATE)
#undef CBAM_OPS_INSTANTIATE

}  // namespace cpu
}  // namespace cbam_ops
