// The core without Python or TensorFlow: that it stands alone, and what sanitizers have to say.
//
//   core_test [count [first]]    default 1500 1
//
// First what has its own test, then `count` random calls of every op (random_calls.h) and one large
// for every 64, at instruction sets and thread counts that are as random: each follows from its
// number alone, from `first` on.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "core/cpu/work_sharing.h"
#include "python/thread_pool.h"
#include "testing/random_calls.h"

namespace cbam_ops {
namespace {

// The CPU kernels; a way of running a call is a number of threads.
struct CpuKernels {
  static constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16,
                                        DataType::kFloat64};

  template <typename Pick>
  static void Choose(Pick pick) {
    static constexpr cpu::InstructionSet kSets[] = {
        cpu::InstructionSet::kBaseline, cpu::InstructionSet::kAvx2, cpu::InstructionSet::kAvx512};
    while (!cpu::SetInstructionSet(kSets[pick(3)])) {
    }
  }
  template <typename Pick>
  static std::pair<int, int> Ways(Pick pick) {
    return {1, 2 + pick(3)};
  }
  static std::string Name() { return cpu::Name(cpu::ActiveInstructionSet()); }
  static constexpr bool kTakesOver = true;
  static bool Holds(Fill /*fill*/) { return true; }

  template <typename Args>
  static size_t WorkspaceBytes(const Problem& problem, int threads) {
    cpu::Parallel parallel;
    parallel.threads = threads;
    return cpu::WorkspaceBytes<Args>(problem, parallel);
  }
  template <typename Args>
  static Status Run(const Problem& problem, const Args& args, void* workspace, int threads) {
    python::ThreadPool& pool = python::ThreadPool::Shared(threads - 1);
    cpu::WorkSharing sharing(
        threads, [&pool](std::function<void()> closure) { pool.Schedule(std::move(closure)); });
    return cpu::Run(problem, args, workspace, sharing.parallel());
  }
};

// Helpers that never start, or start when all is over, must not be waited for.
void TestWorkSharing() {
  std::vector<std::function<void()>> late;
  cpu::WorkSharing sharing(4, [&late](std::function<void()> f) { late.push_back(std::move(f)); });
  const cpu::Parallel parallel = sharing.parallel();
  int64_t sum = 0;
  parallel.run(
      parallel.context, 10,
      [](void* argument, int64_t i) { *static_cast<int64_t*>(argument) += i; }, &sum);
  Expect(sum == 45, "the calling thread does all the work when no helper starts");
  for (const auto& helper : late) helper();
  Expect(sum == 45, "helpers that come late do nothing");
}

void TestStatuses() {
  Problem p;
  p.batch = p.height = p.width = p.channels = 1;
  const cpu::Parallel parallel;
  const auto refused = [&](const Problem& problem) {
    const Status status = cpu::Run(problem, ForwardArgs(), nullptr, parallel);
    return status.code == StatusCode::kInvalidProblem && status.message[0] != '\0' &&
           cpu::Run(problem, BackwardArgs(), nullptr, parallel).code == StatusCode::kInvalidProblem;
  };
  Problem even = p;
  even.kernel_height = 4;
  Expect(refused(even), "an even kernel is refused");
  Problem even_width = p;
  even_width.kernel_width = 4;
  Expect(refused(even_width), "a kernel of even width is refused");
  Problem even_depth = p;
  even_depth.kernel_depth = 4;
  Expect(refused(even_depth), "a kernel of even depth is refused");
  Problem negative = p;
  negative.width = -1;
  Expect(refused(negative), "a negative size is refused");
  Problem none = p;
  none.hidden = 0;
  Expect(refused(none), "no hidden units are refused");
  Problem norm = p;
  norm.module = Module::kChannelAttention;
  norm.batch_norm = true;
  Expect(refused(norm), "a batch norm without a spatial gate is refused");
}

// Sizes whose products do not fit are refused before anything is multiplied; an empty batch takes
// no workspace, however large its samples would be, and its weights have gradients of 0.
void TestSizes() {
  constexpr int64_t k30 = int64_t{1} << 30, k31 = int64_t{1} << 31, k62 = int64_t{1} << 62;
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const cpu::Parallel parallel;
  const auto make = [](int64_t n, int64_t h, int64_t w, int64_t c) {
    Problem p;
    p.batch = n;
    p.height = h;
    p.width = w;
    p.channels = c;
    p.batch_norm = true;
    return p;
  };
  for (const auto& [layout, depth] :
       {std::pair(Layout::kNHWC, int64_t{1}), std::pair(Layout::kNCHW, int64_t{1}),
        std::pair(Layout::kNHWC, kMost)}) {
    const Problem refused[] = {
        make(1, k31, k31, 2), make(2, k30, k30, 1),     make(k62, 1, 1, 1),
        make(4, k62, 1, 1),   make(1, kMost, kMost, 1), make(k31, 0, 1, k31),
        make(1, k62, 4, 0),   make(kMost, 1, 1, 0),     make(k31, k31, 0, kMost),
    };
    for (Problem p : refused) {
      p.layout = layout;
      p.depth = p.kernel_depth = depth;
      Expect(
          cpu::WorkspaceBytes<ForwardArgs>(p, parallel) == 0 &&
              cpu::WorkspaceBytes<BackwardArgs>(p, parallel) == 0 &&
              cpu::Run(p, ForwardArgs(), nullptr, parallel).code == StatusCode::kInvalidProblem &&
              cpu::Run(p, BackwardArgs(), nullptr, parallel).code == StatusCode::kInvalidProblem,
          "refused: " + Describe(p));
    }
    const Problem empty[] = {make(0, k30, k30, 1), make(0, k62, k62, 3), make(0, kMost, 1, 2)};
    for (Problem p : empty) {
      p.layout = layout;
      p.depth = depth;
      Expect(cpu::WorkspaceBytes<ForwardArgs>(p, parallel) == 0 &&
                 cpu::WorkspaceBytes<BackwardArgs>(p, parallel) == 0 &&
                 cpu::WorkspaceBytes<ChannelPoolArgs>(p, parallel) == 0 &&
                 cpu::WorkspaceBytes<SpatialPoolArgs>(p, parallel) == 0,
             "no workspace for " + Describe(p));
      ops::Options options;
      options.problem = p;
      const ops::Dimensions dimensions = DimensionsOf(p);
      Tensors tensors;
      const auto call = [&](const auto& signature) {
        for (const auto& input : signature.inputs) {
          if (ops::IsPresent(input.argument, options))
            tensors.emplace(input.argument.name, Values(SizeOf(input.argument, dimensions), 1));
        }
        Call<CpuKernels>(signature, options, 1, &tensors);
      };
      call(ops::kCbam);
      call(ops::kCbamGrad);
      for (const auto& output : ops::kCbamGrad.outputs) {
        for (const double value : tensors[output.argument.name])
          Expect(value == 0,
                 std::string(output.argument.name) + " of " + Describe(p) + " is not 0");
      }
    }
  }
}

// Scratch memory is bounded by what the maps take, or is small, whatever the kernel.
void TestWorkspace() {
  struct Row {
    int64_t n, h, w, c, kh, kw;
    bool batch_norm;
  };
  const Row rows[] = {
      {200000, 1, 1, 2, 7, 7, false},     {200000, 1, 1, 2, 31, 31, false},
      {300000, 1, 1, 2, 401, 401, false}, {200000, 1, 1, 2, 7, 7, true},
      {50000, 2, 2, 2, 31, 31, true},     {20000, 4, 4, 4, 7, 7, false},
      {4096, 7, 7, 16, 7, 7, false},      {1000, 16, 16, 2, 31, 31, false},
      {256, 7, 7, 2048, 7, 7, false},     {32, 56, 56, 256, 7, 7, false},
      {8, 112, 112, 64, 7, 7, true},      {1, 1024, 1024, 3, 7, 7, false},
      {2, 300, 300, 2, 401, 401, true},   {1, 1, 1000000, 2, 31, 31, false},
      {1, 1000000, 1, 2, 31, 31, false},  {1, 1000000, 1, 2, 31, 31, true},
      {4, 100000, 3, 2, 7, 7, true},      {16, 5000, 1, 64, 401, 1, false},
      {16, 1, 5000, 64, 1, 401, true},
  };
  cpu::Parallel parallel;
  {
    // The last stage of ResNet-50, where a step's extra memory is largest beside the map.
    Problem p;
    p.batch = 16;
    p.height = p.width = 7;
    p.channels = 2048;
    p.hidden = 128;
    parallel.threads = 2;
    const size_t bytes = cpu::WorkspaceBytes<BackwardArgs>(p, parallel);
    Expect(static_cast<double>(bytes) <= 0.05 * static_cast<double>(4 * MapSize(p)),
           "backward's workspace of " + Describe(p) + ": " + std::to_string(bytes) + " bytes");
  }
  for (const int threads : {1, 4, 16}) {
    parallel.threads = threads;
    for (const Row& row : rows) {
      for (const Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
        Problem p;
        p.layout = layout;
        p.batch = row.n;
        p.height = row.h;
        p.width = row.w;
        p.channels = row.c;
        p.kernel_height = row.kh;
        p.kernel_width = row.kw;
        p.batch_norm = row.batch_norm;
        const auto map = static_cast<double>(4 * MapSize(p));
        for (const auto bytes : {cpu::WorkspaceBytes<ForwardArgs>(p, parallel),
                                 cpu::WorkspaceBytes<BackwardArgs>(p, parallel)}) {
          const double most = 24e6 + 5 * map;
          Expect(static_cast<double>(bytes) <= most,
                 "workspace of " + Describe(p) + " for " + std::to_string(threads) + " threads: " +
                     std::to_string(bytes) + " bytes of a map of " + std::to_string(map));
        }
      }
    }
  }
}

constexpr uint64_t kCallsPerLarge = 64;

int RunAll(int64_t count, uint64_t first) {
  TestWorkSharing();
  TestStatuses();
  TestSizes();
  TestWorkspace();
  for (uint64_t number = first; number < first + static_cast<uint64_t>(count); ++number) {
    RandomCall<CpuKernels>(number).Check();
    if (failures > 20) break;
    if (number % kCallsPerLarge == 0) RandomCall<CpuKernels>(number, /*is_large=*/true).Check();
  }
  for (const cpu::InstructionSet set :
       {cpu::InstructionSet::kBaseline, cpu::InstructionSet::kAvx2, cpu::InstructionSet::kAvx512}) {
    std::printf("%s: %s\n", cpu::IsAvailable(set) ? "tested" : "not on this machine",
                cpu::Name(set));
  }
  std::printf("%lld gradients compared, errors up to %.2f of what is allowed\n",
              static_cast<long long>(RandomCall<CpuKernels>::compared),
              RandomCall<CpuKernels>::strain);
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace
}  // namespace cbam_ops

int main(int argc, char** argv) {
  return cbam_ops::RunAll(argc > 1 ? std::atoll(argv[1]) : 1500,
                          argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
}
