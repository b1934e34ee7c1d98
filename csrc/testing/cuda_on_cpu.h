// Runs the kernel sources of core/cuda on a CPU, one fiber per CUDA thread.
//
// core/cuda/device.cuh includes this file where there is no nvcc. What a kernel can do there it can
// do here:
//
//   blocks         run at once, or as many as Device says, in an order drawn from a seed; each ends
//                  before another takes its place
//   threads        are fibers on the calling thread; a thread runs until it waits, and which is next
//                  is drawn from the same seed: what a missing barrier or a missing wait lets another
//                  thread see depends on the seed only, so failures repeat
//   shared memory  is a heap block of exactly the requested size, filled with NaN before each block,
//                  and again where a kernel says that what is there may not be used
//   barriers       shuffles, tickets and counters are exact: a thread that waits for what never comes
//                  is reported (kernel name, what it waits for), not hung on
//
// Under AddressSanitizer and ThreadSanitizer fibers are announced to the sanitizer. Switching
// fibers does not synchronise them for ThreadSanitizer, only the barriers do, and counters from the
// thread that adds to the one that waits; so it sees what is missing whatever the schedule, within
// a block and between blocks. A ticket orders nothing.
//
// The runtime itself (cuda_on_cpu.cc) must be compiled without -fsanitize=thread.
#ifndef CBAM_OPS_TESTING_CUDA_ON_CPU_H_
#define CBAM_OPS_TESTING_CUDA_ON_CPU_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cbam_ops {
namespace cuda_on_cpu {

// ---- for kernels --------------------------------------------------------------------------------

int ThreadIndex();
unsigned char* SharedMemory();
// Of the block, or of its first `threads` threads.
void Barrier(int threads);
// The value that the lane `mask` away passed to the same call; all 32 lanes must take part.
uint64_t ExchangeBits(uint64_t value, int mask);

template <typename A>
A ShuffleXor(A value, int mask) {
  static_assert(sizeof(A) <= sizeof(uint64_t), "one register at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(A));
  bits = ExchangeBits(bits, mask);
  std::memcpy(&value, &bits, sizeof(A));
  return value;
}

// Fills shared memory with NaN from here on.
void ForgetShared(size_t offset);

// See core/cuda/device.cuh.
uint64_t TakeTicket(uint64_t* next);
void AddRelease(uint32_t* counter);
void WaitAcquire(const uint32_t* counter, uint32_t target);
void Publish(uint32_t* flag, uint32_t value);
bool WaitUnless(const uint32_t* counter, uint32_t target, const uint32_t* flag, uint32_t value);

float HalfToFloat(uint16_t bits);
uint16_t FloatToHalf(float value);
inline float BFloat16ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}
inline uint16_t FloatToBFloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- for launchers ------------------------------------------------------------------------------

struct LaunchShape {
  const char* kernel = "";
  int64_t blocks = 1;
  int threads = 32;
  size_t shared_bytes = 0;
};

// Runs `body(argument)` once per thread and returns when all have ended.
void Run(const LaunchShape& shape, void (*body)(const void* argument), const void* argument);

template <typename Params>
struct KernelCall {
  void (*kernel)(Params);
  const Params* params;
  static void Invoke(const void* call) {
    const auto* self = static_cast<const KernelCall*>(call);
    self->kernel(*self->params);
  }
};

template <typename Params>
void Launch(const LaunchShape& shape, void (*kernel)(Params), const Params& params) {
  const KernelCall<Params> call{kernel, &params};
  Run(shape, &KernelCall<Params>::Invoke, &call);
}

// The device that is pretended; tests change it.
struct Device {
  int capability = 90;
  int64_t multiprocessors = 2;
  int64_t resident_blocks = 0;  // that run at once; 0: all
};
Device& PretendedDevice();

// The seed of the schedule; 0 is the order of the indices.
void SetSchedule(uint64_t seed);
// The names of the kernels launched since the last call, separated by spaces.
const char* TakeLaunchedKernels();

// Called where a kernel does what would hang or be undefined on a GPU; the default prints and
// aborts.
using FailureHandler = void (*)(const char* message);
void SetFailureHandler(FailureHandler handler);

}  // namespace cuda_on_cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_CUDA_ON_CPU_H_
