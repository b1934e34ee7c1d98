// What the kernel sources may use of the machine, in one place: thread indices, shared memory,
// barriers, shuffles, tickets and counters in global memory, vectors and the map types. Under nvcc
// these are intrinsics; under a C++ compiler they are the wrappers of testing/cuda_on_cpu.h, which
// run the same kernel sources on a CPU, one fiber per CUDA thread. Nothing here needs more than
// compute capability 7.5 has.
//
// Half types are plain 16-bit structs converted with PTX instructions: the toolkit's half headers
// would cost more compile time than all kernels together.
#ifndef CBAM_OPS_CORE_CUDA_DEVICE_CUH_
#define CBAM_OPS_CORE_CUDA_DEVICE_CUH_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/cuda/schedule.h"

#if defined(__CUDACC__)
#define CBAM_DEVICE __device__ __forceinline__
#define CBAM_INLINE_LAMBDA __attribute__((always_inline))
// How many blocks a multiprocessor shall hold at least: without it the compiler would rather spill
// a register or two than miss one of its own steps of occupancy.
#define CBAM_KERNEL(blocks) __global__ void __launch_bounds__(::cbam_ops::cuda::kBlock, blocks)
#define CBAM_PARAMETER const __grid_constant__
#define CBAM_UNROLL _Pragma("unroll")
#define CBAM_NO_UNROLL _Pragma("unroll 1")
#define CBAM_UNROLL_4 _Pragma("unroll 4")
#else
#include "testing/cuda_on_cpu.h"
#define CBAM_DEVICE inline
#define CBAM_INLINE_LAMBDA
#define CBAM_KERNEL(blocks) void
#define CBAM_PARAMETER const
#define CBAM_UNROLL
#define CBAM_NO_UNROLL
#define CBAM_UNROLL_4
#endif

namespace cbam_ops {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;             // that work on an item
constexpr int kBlock = kThreads + kWarp;  // and a warp that fetches the next one
constexpr int kControlBytes = 128;        // of shared memory, for what that warp says
constexpr int kItemBytes = 20 * 1024;     // of shared memory, for the item
constexpr int kSharedBytes = kControlBytes + kItemBytes;
// Blocks that a multiprocessor shall hold: while some wait the others work. Of five warps each, four
// leave a thread 96 registers, three 128 and two, which float64's backward needs, 168.
template <typename A>
constexpr int kForwardBlocks = sizeof(A) == 8 ? 3 : 4;
template <typename A>
constexpr int kBackwardBlocks = sizeof(A) == 8 ? 2 : 3;

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

// Elements of a vector of a map: four, where all rows begin at a multiple of that, or one. Of
// float32 that is 16 bytes, of half types 8, which the rows of 14 x 14 in NCHW have too and which
// leaves their arithmetic as many registers. A float64 is 8 bytes by itself.
template <typename T>
constexpr int kWidest = sizeof(T) == 8 ? 1 : 4;
constexpr int kSector = 32;  // bytes that memory and caches move at least
// Rows that a thread has in flight of so many maps: about 64 bytes of loads, as registers allow.
template <typename T>
CBAM_HOST_DEVICE constexpr int RowsAtOnce(int vector, int maps) {
  if (sizeof(T) == 8 || vector * static_cast<int>(sizeof(T)) >= 16) return 4 / maps;
  return maps == 1 ? 6 : maps == 2 ? 3 : 2;
}

// ---- the machine -------------------------------------------------------------------------------

#if defined(__CUDACC__)

CBAM_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
CBAM_DEVICE unsigned char* BlockMemory() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
}
// Of the threads that work on an item; of the whole block.
CBAM_DEVICE void Barrier() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }
// Not `bar.sync`, which wants whole warps: a thread of the warp that fetches items comes its own
// way.
CBAM_DEVICE void BlockBarrier() { asm volatile("barrier.sync 0, %0;" ::"n"(kBlock) : "memory"); }
CBAM_DEVICE void ConvergeWarp() { __syncwarp(); }
template <typename A>
CBAM_DEVICE A ShuffleXor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Shared memory of an item holds what the item before it left: nothing that may be used.
CBAM_DEVICE void ForgetShared() {}

// The next number of a counter that all blocks share. Orders nothing.
CBAM_DEVICE uint64_t TakeTicket(uint64_t* next) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(next), 1ull);
}
// Adds 1 to a counter of the device. Whoever has waited for that sees what the caller wrote before,
// and what others had written before the last barrier that they shared with the caller.
CBAM_DEVICE void AddRelease(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
CBAM_DEVICE uint32_t LoadAcquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
CBAM_DEVICE void WaitAcquire(const uint32_t* counter, uint32_t target) {
  while (LoadAcquire(counter) < target) __nanosleep(32);
}
// Within the block: says that `flag` is now `value`.
CBAM_DEVICE void Publish(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.cta.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Waits for a counter as WaitAcquire does, but gives up when `flag` is `value`: false.
CBAM_DEVICE bool WaitUnless(const uint32_t* counter, uint32_t target, const uint32_t* flag,
                            uint32_t value) {
  for (;;) {
    if (LoadAcquire(counter) >= target) return true;
    uint32_t now;
    asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(now) : "l"(flag) : "memory");
    if (now == value) return false;
    __nanosleep(32);
  }
}

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

// sum + (a == b ? 1 : 0): a comparison and an addition.
CBAM_DEVICE float CountEqual(float a, float b, float sum) {
  asm("{.reg .pred equal; setp.eq.f32 equal, %1, %2; @equal add.f32 %0, %0, 0f3F800000;}"
      : "+f"(sum)
      : "f"(a), "f"(b));
  return sum;
}

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

using cuda_on_cpu::AddRelease;
using cuda_on_cpu::Publish;
using cuda_on_cpu::ShuffleXor;
using cuda_on_cpu::TakeTicket;
using cuda_on_cpu::ThreadIndex;
using cuda_on_cpu::WaitAcquire;
using cuda_on_cpu::WaitUnless;
inline unsigned char* BlockMemory() { return cuda_on_cpu::SharedMemory(); }
inline void Barrier() { cuda_on_cpu::Barrier(kThreads); }
inline void BlockBarrier() { cuda_on_cpu::Barrier(kBlock); }
inline void ConvergeWarp() {}
inline void ForgetShared() {
  Barrier();
  if (ThreadIndex() == 0) cuda_on_cpu::ForgetShared(kControlBytes);
  Barrier();
}

inline float Multiply(float a, float b) { return a * b; }  // the build forbids contraction
inline double Multiply(double a, double b) { return a * b; }
inline float Maximum(float a, float b) { return (b > a || b != b) ? b : a; }
inline double Maximum(double a, double b) { return (b > a || b != b) ? b : a; }
inline float CountEqual(float a, float b, float sum) { return a == b ? sum + 1.0f : sum; }
inline float ToCompute(Half value) { return cuda_on_cpu::HalfToFloat(value.bits); }
inline float ToCompute(BFloat16 value) { return cuda_on_cpu::BFloat16ToFloat(value.bits); }
inline void FromCompute(float value, Half* result) {
  result->bits = cuda_on_cpu::FloatToHalf(value);
}
inline void FromCompute(float value, BFloat16* result) {
  result->bits = cuda_on_cpu::FloatToBFloat16(value);
}

#endif

CBAM_DEVICE double CountEqual(double a, double b, double sum) { return a == b ? sum + 1.0 : sum; }
CBAM_DEVICE float ToCompute(float value) { return value; }
CBAM_DEVICE double ToCompute(double value) { return value; }
CBAM_DEVICE void FromCompute(float value, float* result) { *result = value; }
CBAM_DEVICE void FromCompute(double value, double* result) { *result = value; }

// ---- vectors ------------------------------------------------------------------------------------

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T value[V];
};

// Plain loads and stores, never those for constant data: what one item reads another has written
// in the same launch.
template <typename T, int V>
CBAM_DEVICE Vec<T, V> Load(const T* pointer) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2 && V == 4) {  // as words: see At
    const uint2 bits = *reinterpret_cast<const uint2*>(pointer);
    Vec<T, V> vec;
    memcpy(&vec, &bits, sizeof(bits));
    return vec;
  }
#endif
  return *reinterpret_cast<const Vec<T, V>*>(pointer);
}

// For what is not read again: marked to leave the cache first, so that what the next phase reads
// again stays.
template <typename T, int V>
CBAM_DEVICE Vec<T, V> LoadLast(const T* pointer) {
#if defined(__CUDACC__)
  if constexpr (sizeof(Vec<T, V>) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(pointer));
    Vec<T, V> vec;
    memcpy(&vec, &bits, sizeof(bits));
    return vec;
  } else if constexpr (sizeof(Vec<T, V>) == 8) {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(pointer));
    Vec<T, V> vec;
    memcpy(&vec, &bits, sizeof(bits));
    return vec;
  }
#endif
  return Load<T, V>(pointer);
}
template <typename T, int V>
CBAM_DEVICE void StoreStreaming(T* pointer, const Vec<T, V>& vec) {
#if defined(__CUDACC__)
  if constexpr (sizeof(vec) == 16) {
    uint4 bits;
    memcpy(&bits, &vec, sizeof(bits));
    __stcs(reinterpret_cast<uint4*>(pointer), bits);
    return;
  } else if constexpr (sizeof(vec) == 8) {
    uint2 bits;
    memcpy(&bits, &vec, sizeof(bits));
    __stcs(reinterpret_cast<uint2*>(pointer), bits);
    return;
  }
#endif
  *reinterpret_cast<Vec<T, V>*>(pointer) = vec;
}

// A value of a vector, and a vector of values. Two bfloat16 lie in a word: the upper one is the
// word without its lower half, and two values are rounded by one instruction.
template <typename T, int V>
CBAM_DEVICE Compute<T> At(const Vec<T, V>& vec, int i) {
  if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
    uint32_t word;
    memcpy(&word, &vec.value[i / 2 * 2], sizeof(word));
    word = i % 2 == 0 ? word << 16 : word & 0xffff0000u;
    float result;
    memcpy(&result, &word, sizeof(word));
    return result;
  } else {
    return ToCompute(vec.value[i]);
  }
}
template <typename T, int V>
CBAM_DEVICE Vec<T, V> FromValues(const Compute<T> (&values)[V]) {
  Vec<T, V> vec;
#if __CUDA_ARCH__ >= 800
  constexpr bool kByTwo = sizeof(T) == 2 && V % 2 == 0;
  if constexpr (kByTwo) {
    CBAM_UNROLL
    for (int i = 0; i < V; i += 2) {
      uint32_t word;
      if constexpr (std::is_same_v<T, BFloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[i + 1]), "f"(values[i]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[i + 1]), "f"(values[i]));
      }
      memcpy(&vec.value[i], &word, sizeof(word));
    }
  }
#else
  constexpr bool kByTwo = false;
#endif
  if constexpr (!kByTwo) {
    CBAM_UNROLL
    for (int i = 0; i < V; ++i) FromCompute(values[i], &vec.value[i]);
  }
  return vec;
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

template <typename A>
CBAM_DEVICE bool IsFinite(A v) {
  return v - v == A(0);
}

// The sum over a warp, in every lane.
template <typename A>
CBAM_DEVICE A SumOverWarp(A value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += ShuffleXor(value, mask);
  return value;
}

// Where an item keeps what its threads share: kItemBytes.
template <typename A>
CBAM_DEVICE A* Shared() {
  return reinterpret_cast<A*>(BlockMemory() + kControlBytes);
}

// Of numbers below 2^31 (item indices, positions and channels of a sample): a 64-bit division is a
// call of 100 instructions.
CBAM_DEVICE int64_t Quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}
CBAM_DEVICE int64_t Remainder(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
}

CBAM_DEVICE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CBAM_DEVICE uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
CBAM_DEVICE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_DEVICE_CUH_
