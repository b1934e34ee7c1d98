// The kernels on CPUs: entry points, the means to run that a caller gives, and the choice of
// instruction set.
#ifndef CBAM_OPS_CORE_CPU_KERNELS_H_
#define CBAM_OPS_CORE_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "core/contract.h"

// What follows is exported from the shared library of the core (csrc/cmake/exports_core.map).
#pragma GCC visibility push(default)

namespace cbam_ops {
namespace cpu {

// How a caller lends its threads. `run` calls task(argument, i) once for every i in [0, tasks), in
// any order and on any threads, the calling one included, and returns when all have returned.
// `threads` is how many may run at once: it sizes the work, never the results, which are bitwise
// the same for any value. With `run` null everything happens on the calling thread.
struct Parallel {
  int threads = 1;
  void* context = nullptr;
  void (*run)(void* context, int64_t tasks, void (*task)(void* argument, int64_t index),
              void* argument) = nullptr;
};

// Instruction sets in rising order. kBaseline is what the compiler may assume on any machine (SSE2
// on x86-64, NEON on aarch64, where it is the only one).
enum class InstructionSet : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best set this processor and this build have, unless the environment variable
// CBAM_OPS_INSTRUCTION_SET (baseline, avx2 or avx512, read once) asks for a lower one.
InstructionSet ActiveInstructionSet();
// Sets the choice for the process (for tests); false, and no change, where the processor or the
// build lacks it.
bool SetInstructionSet(InstructionSet instruction_set);
bool IsAvailable(InstructionSet instruction_set);
const char* Name(InstructionSet instruction_set);  // "baseline", "avx2", "avx512"

// Both for each of contract.h's argument structs. Maps are streamed from memory once (forward) or
// once each (backward); see pipeline.h. The pragma does not reach function templates.
//
// Bytes of scratch memory that a call needs, aligned to kHostAlignment. 0 is a possible answer.
template <typename Args>
__attribute__((visibility("default"))) size_t WorkspaceBytes(const Problem& problem,
                                                             const Parallel& parallel);
template <typename Args>
__attribute__((visibility("default"))) Status Run(const Problem& problem, const Args& args,
                                                  void* workspace, const Parallel& parallel);

}  // namespace cpu
}  // namespace cbam_ops

#pragma GCC visibility pop

#endif  // CBAM_OPS_CORE_CPU_KERNELS_H_
