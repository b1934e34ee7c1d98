// What the kernel sources may use of the machine, in one place: thread indices, shared memory,
// barriers, shuffles, clusters, bulk copies, 16-byte vectors and the map types. Under nvcc these
// are the intrinsics; under a C++ compiler they are the wrappers of testing/cuda_on_cpu.h, which
// run the same kernel sources on a CPU, one fiber per CUDA thread.
//
// Half types are plain 16-bit structs converted with PTX instructions: the toolkit's half headers
// would cost more compile time than all kernels together.
#ifndef CBAM_OPS_CORE_CUDA_DEVICE_CUH_
#define CBAM_OPS_CORE_CUDA_DEVICE_CUH_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CBAM_DEVICE __device__ __forceinline__
// How many blocks a multiprocessor shall hold at least: without it the compiler would rather spill
// a register or two than miss one of its own steps of occupancy. Registers are what keeps loads in
// flight here.
#define CBAM_KERNEL(blocks) __global__ void __launch_bounds__(::cbam_ops::cuda::kThreads, blocks)
#define CBAM_CLUSTER_KERNEL(blocks) \
  __global__ void __launch_bounds__(::cbam_ops::cuda::kClusterThreads, blocks)
#define CBAM_UNROLL _Pragma("unroll")
#define CBAM_NO_UNROLL _Pragma("unroll 1")
#else
#include "testing/cuda_on_cpu.h"
#define CBAM_DEVICE inline
#define CBAM_KERNEL(blocks) void
#define CBAM_CLUSTER_KERNEL(blocks) void
#define CBAM_UNROLL
#define CBAM_NO_UNROLL
#endif

namespace cbam_ops {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of every kernel but the cluster ones
constexpr int kClusterThreads =
    512;  // of the cluster kernels: they own a multiprocessor, or half of one

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The compute type of a map type.
template <typename T>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::Type;

// Elements of a 16-byte vector.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// ---- the machine -------------------------------------------------------------------------------

#if defined(__CUDACC__)

CBAM_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
CBAM_DEVICE int64_t BlockIndex() { return static_cast<int64_t>(blockIdx.x); }
CBAM_DEVICE unsigned char* SharedMemory() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
}
CBAM_DEVICE void Barrier() { __syncthreads(); }
template <typename A>
CBAM_DEVICE A ShuffleXor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Programmatic dependent launch: a kernel may be set up while its predecessor drains. Nothing that
// a predecessor wrote, and nothing that it may still read, is touched before WaitForPredecessors;
// each kernel waits, so the order is transitive.
CBAM_DEVICE void WaitForPredecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
CBAM_DEVICE void AllowSuccessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Thread-block clusters, and bulk copies that a memory barrier in shared memory waits for: compute
// capability 9.0 on. A kernel that uses them has an empty body on older architectures
// (CBAM_HAVE_CLUSTERS) and is never launched there.
#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
#define CBAM_HAVE_CLUSTERS 1
CBAM_DEVICE uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
CBAM_DEVICE int ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
CBAM_DEVICE int ClusterSize() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
// Also a barrier of the block; orders what was written to any block's shared memory.
CBAM_DEVICE void ClusterBarrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// The address in block `rank`'s shared memory that corresponds to `pointer` in one's own.
template <typename P>
CBAM_DEVICE P* MapToRank(P* pointer, int rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(mapped)
               : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<P*>(mapped);
}
// One arrival, which announces the bytes. To be followed by a barrier of the block.
CBAM_DEVICE void InitCopyBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
CBAM_DEVICE void ExpectBytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
CBAM_DEVICE void BulkCopyToShared(void* destination, const void* source, uint32_t bytes,
                                  uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(destination)),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
CBAM_DEVICE void WaitForCopies(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
#endif

CBAM_DEVICE float Multiply(float a, float b) { return __fmul_rn(a, b); }
CBAM_DEVICE double Multiply(double a, double b) { return __dmul_rn(a, b); }
// The larger, NaN if either is.
CBAM_DEVICE float Maximum(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return (b > a || b != b) ? b : a;
#endif
}
CBAM_DEVICE double Maximum(double a, double b) { return (b > a || b != b) ? b : a; }

CBAM_DEVICE float ToCompute(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
CBAM_DEVICE float ToCompute(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
CBAM_DEVICE void FromCompute(float value, Half* result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result->bits) : "f"(value));
}
CBAM_DEVICE void FromCompute(float value, BFloat16* result) {
#if __CUDA_ARCH__ >= 800
  // The form that takes two, for the older machines of the range: the upper half is dropped.
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  result->bits = static_cast<uint16_t>(pair);
#else
  const uint32_t bits = __float_as_uint(value);
  result->bits = static_cast<uint16_t>(
      value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

#else  // on a CPU

#define CBAM_HAVE_CLUSTERS 1
using cuda_on_cpu::AllowSuccessors;
using cuda_on_cpu::Barrier;
using cuda_on_cpu::BlockIndex;
using cuda_on_cpu::BulkCopyToShared;
using cuda_on_cpu::ClusterBarrier;
using cuda_on_cpu::ClusterRank;
using cuda_on_cpu::ClusterSize;
using cuda_on_cpu::ExpectBytes;
using cuda_on_cpu::InitCopyBarrier;
using cuda_on_cpu::SharedMemory;
using cuda_on_cpu::ShuffleXor;
using cuda_on_cpu::ThreadIndex;
using cuda_on_cpu::WaitForCopies;
using cuda_on_cpu::WaitForPredecessors;
template <typename P>
P* MapToRank(P* pointer, int rank) {
  return static_cast<P*>(cuda_on_cpu::MapToRank(pointer, rank));
}

inline float Multiply(float a, float b) { return a * b; }  // the build forbids contraction
inline double Multiply(double a, double b) { return a * b; }
inline float Maximum(float a, float b) { return (b > a || b != b) ? b : a; }
inline double Maximum(double a, double b) { return (b > a || b != b) ? b : a; }
inline float ToCompute(Half value) { return cuda_on_cpu::HalfToFloat(value.bits); }
inline float ToCompute(BFloat16 value) { return cuda_on_cpu::BFloat16ToFloat(value.bits); }
inline void FromCompute(float value, Half* result) {
  result->bits = cuda_on_cpu::FloatToHalf(value);
}
inline void FromCompute(float value, BFloat16* result) {
  result->bits = cuda_on_cpu::FloatToBFloat16(value);
}

#endif

CBAM_DEVICE float ToCompute(float value) { return value; }
CBAM_DEVICE double ToCompute(double value) { return value; }
CBAM_DEVICE void FromCompute(float value, float* result) { *result = value; }
CBAM_DEVICE void FromCompute(double value, double* result) { *result = value; }

// ---- vectors ------------------------------------------------------------------------------------

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T value[V];
};

template <typename T, int V>
CBAM_DEVICE Vec<T, V> Load(const T* pointer) {
  return *reinterpret_cast<const Vec<T, V>*>(pointer);
}

// A store that will not be read again soon: marked to leave the cache first, so that what the next
// pass re-reads stays.
template <typename T, int V>
CBAM_DEVICE void StoreStreaming(T* pointer, const Vec<T, V>& vec) {
#if defined(__CUDACC__)
  if constexpr (sizeof(vec) == 16) {
    uint4 bits;
    memcpy(&bits, &vec, sizeof(bits));
    __stcs(reinterpret_cast<uint4*>(pointer), bits);
    return;
  }
#endif
  *reinterpret_cast<Vec<T, V>*>(pointer) = vec;
}

// ---- numbers ------------------------------------------------------------------------------------

template <typename A>
CBAM_DEVICE A Lowest() {
  return -static_cast<A>(INFINITY);
}
template <typename A>
CBAM_DEVICE A NotANumber() {
  return static_cast<A>(NAN);
}
CBAM_DEVICE float Exp(float v) { return expf(v); }
CBAM_DEVICE double Exp(double v) { return exp(v); }
CBAM_DEVICE float SquareRoot(float v) { return sqrtf(v); }
CBAM_DEVICE double SquareRoot(double v) { return sqrt(v); }

// Exact at both ends: exp overflows to infinity and 1 / infinity is 0.
template <typename A>
CBAM_DEVICE A Sigmoid(A z) {
  return A(1) / (A(1) + Exp(-z));
}
// NaN passes, as in TensorFlow.
template <typename A>
CBAM_DEVICE A Relu(A v) {
  return v <= A(0) ? A(0) : v;
}

// Sums over `width` neighbouring lanes (a power of two, at most a warp); every lane gets the
// result.
template <typename A>
CBAM_DEVICE A SumOverLanes(A value, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2) value += ShuffleXor(value, mask);
  return value;
}
template <typename A>
CBAM_DEVICE A MaximumOverLanes(A value, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2) value = Maximum(value, ShuffleXor(value, mask));
  return value;
}

// Of numbers below 2^31 (block indices, positions and channels of a sample): a 64-bit division is a
// call of 100 instructions.
CBAM_DEVICE int64_t Quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}
CBAM_DEVICE int64_t Remainder(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
}

CBAM_DEVICE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CBAM_DEVICE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_DEVICE_CUH_
