// Runs the kernel sources of core/cuda on a CPU, one fiber per CUDA thread.
//
// core/cuda/device.cuh includes this file where there is no nvcc. What a kernel can do there it can
// do here:
//
//   blocks         run one after the other (the blocks of a cluster together), in an order drawn
//                  from a seed
//   threads        are fibers on the calling thread, scheduled in an order drawn from the same
//                  seed; a thread runs until it waits, so what a missing barrier lets another
//                  thread see depends on the seed only: failures repeat
//   shared memory  is a heap block of exactly the requested size, filled with NaN before each block
//   barriers       shuffles, cluster barriers, memory barriers with transaction counts and bulk
//                  copies are exact: a thread that leaves while others wait for it is reported
//                  (kernel name, what they wait for), not hung on. A bulk copy happens as late as
//                  it may: when a thread first waits for it
//
// Under AddressSanitizer and ThreadSanitizer fibers are announced to the sanitizer. Switching
// fibers does not synchronise them for ThreadSanitizer, only the barriers do; so it sees a missing
// barrier whatever the schedule, and two blocks that write the same address.
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
int64_t BlockIndex();
unsigned char* SharedMemory();
void Barrier();
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

inline void WaitForPredecessors() {}
inline void AllowSuccessors() {}

// Clusters.
int ClusterRank();
int ClusterSize();
void ClusterBarrier();
// The address in block `rank`'s shared memory that corresponds to `pointer` in one's own.
void* MapToRank(void* pointer, int rank);

// Memory barriers in shared memory that count bytes: one arrival, then as many bytes as announced.
void InitCopyBarrier(uint64_t* barrier);
void ExpectBytes(uint64_t* barrier, uint32_t bytes);
void BulkCopyToShared(void* destination, const void* source, uint32_t bytes, uint64_t* barrier);
void WaitForCopies(uint64_t* barrier, int parity);

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
  int cluster = 1;
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
  int64_t l2_bytes = 1 << 20;
  int capability = 90;
  int multiprocessors = 4;
  int64_t shared_bytes = 232448;  // per block, at most
  int max_cluster = 16;
};
Device& PretendedDevice();

// The seed of the schedule; 0 is the order of the indices.
void SetSchedule(uint64_t seed);
// Launches so far, for tests that count them.
int64_t LaunchCount();
// The names of the kernels launched since the last call, separated by spaces.
const char* TakeLaunchedKernels();

// Called where a kernel does what would hang or be undefined on a GPU; the default prints and
// aborts.
using FailureHandler = void (*)(const char* message);
void SetFailureHandler(FailureHandler handler);

}  // namespace cuda_on_cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_CUDA_ON_CPU_H_
