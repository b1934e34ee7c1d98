// Vectors of one instruction set, for level.cc and the files it includes. Everything here has
// internal linkage: the same source is compiled once per instruction set, and a symbol shared
// between two of them would let code of the higher set run on a processor that lacks it. For the
// same reason nothing here includes the standard library's templates.
//
// Written with the compiler's vector extensions, so that one text serves every width; intrinsics
// only where the extensions have no word for the instruction (maximum, fused multiply-add, half
// conversion, streaming stores, masked loads).
#ifndef CBAM_OPS_CORE_CPU_SIMD_H_
#define CBAM_OPS_CORE_CPU_SIMD_H_

#include <stddef.h>
#include <stdint.h>

#if defined(CBAM_LEVEL_AVX512) && defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header reads a deliberately undefined register and warns of it wherever it
// is inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(CBAM_LEVEL_AVX2) || defined(CBAM_LEVEL_AVX512)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(CBAM_LEVEL_AVX512)
#define CBAM_LEVEL avx512
#define CBAM_VECTOR_BYTES 64
#elif defined(CBAM_LEVEL_AVX2)
#define CBAM_LEVEL avx2
#define CBAM_VECTOR_BYTES 32
#elif defined(CBAM_LEVEL_BASELINE)
#define CBAM_LEVEL baseline
#define CBAM_VECTOR_BYTES 16
#else
#error "compile with one of CBAM_LEVEL_BASELINE, CBAM_LEVEL_AVX2, CBAM_LEVEL_AVX512"
#endif

namespace cbam_ops {
namespace cpu {
namespace CBAM_LEVEL {
namespace {

#define CBAM_INLINE inline __attribute__((always_inline))
#define CBAM_INLINE_LAMBDA __attribute__((always_inline))

// A number that is known where it is passed on as an argument.
template <int64_t kValue>
struct Constant {
  constexpr operator int64_t() const { return kValue; }
};

// Storage types of the half formats.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename A>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(CBAM_VECTOR_BYTES)));
  typedef int32_t I
      __attribute__((vector_size(CBAM_VECTOR_BYTES)));  // also what a comparison gives
  typedef uint32_t U __attribute__((vector_size(CBAM_VECTOR_BYTES)));
  typedef uint16_t H __attribute__((vector_size(CBAM_VECTOR_BYTES / 2)));
  static constexpr int64_t kLanes = CBAM_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(CBAM_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(CBAM_VECTOR_BYTES)));
  static constexpr int64_t kLanes = CBAM_VECTOR_BYTES / 8;
};

using VF = Simd<float>::V;
using VD = Simd<double>::V;

template <typename V>
struct ScalarOf;
template <>
struct ScalarOf<VF> {
  using A = float;
};
template <>
struct ScalarOf<VD> {
  using A = double;
};

template <typename A>
CBAM_INLINE typename Simd<A>::V Splat(A value) {
  return value - typename Simd<A>::V{};
}

template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_inff());

// --- Arithmetic ---

// The greater; where either is NaN the result is unspecified (callers look for NaN in a sum
// instead).
CBAM_INLINE VF Max(VF a, VF b) {
#if defined(CBAM_LEVEL_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CBAM_LEVEL_AVX2)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#elif defined(__aarch64__)
  return vmaxq_f32(a, b);
#else
  return a > b ? a : b;
#endif
}
CBAM_INLINE VD Max(VD a, VD b) {
#if defined(CBAM_LEVEL_AVX512)
  return _mm512_max_pd(a, b);
#elif defined(CBAM_LEVEL_AVX2)
  return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
  return _mm_max_pd(a, b);
#elif defined(__aarch64__)
  return vmaxq_f64(a, b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, rounded once where the instruction set can.
CBAM_INLINE VF Fma(VF a, VF b, VF c) {
#if defined(CBAM_LEVEL_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(CBAM_LEVEL_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
CBAM_INLINE VD Fma(VD a, VD b, VD c) {
#if defined(CBAM_LEVEL_AVX512)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(CBAM_LEVEL_AVX2)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// `value` where the mask is set, else 0.
template <typename V, typename I>
CBAM_INLINE V Where(I mask, V value) {
  return (V)((I)value & mask);
}
template <typename V, typename I>
CBAM_INLINE V Select(I mask, V yes, V no) {
  return (V)(((I)yes & mask) | ((I)no & ~mask));
}
// base + value where the mask is set, else base.
template <typename V, typename I>
CBAM_INLINE V AddWhere(V base, I mask, V value) {
#if defined(CBAM_LEVEL_AVX512)
  return mask ? base + value : base;  // one instruction
#else
  return base + Where(mask, value);
#endif
}

// Sum and maximum of the lanes, by halves: a fixed order for a fixed width.
template <typename V>
CBAM_INLINE typename ScalarOf<V>::A SumLanes(V v) {
  using A = typename ScalarOf<V>::A;
  A lanes[Simd<A>::kLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int64_t width = Simd<A>::kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
template <typename V>
CBAM_INLINE typename ScalarOf<V>::A MaxLanes(V v) {
  using A = typename ScalarOf<V>::A;
  A lanes[Simd<A>::kLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int64_t width = Simd<A>::kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) {
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    }
  }
  return lanes[0];
}
#if defined(CBAM_LEVEL_AVX2) || defined(CBAM_LEVEL_AVX512)
CBAM_INLINE float SumLanes(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
CBAM_INLINE float MaxLanes(__m128 v) {
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
#if defined(CBAM_LEVEL_AVX2)
template <>
CBAM_INLINE float SumLanes<VF>(VF v) {
  return SumLanes(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
template <>
CBAM_INLINE float MaxLanes<VF>(VF v) {
  return MaxLanes(_mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
#else
template <>
CBAM_INLINE float SumLanes<VF>(VF v) {
  return _mm512_reduce_add_ps(v);
}
template <>
CBAM_INLINE float MaxLanes<VF>(VF v) {
  return _mm512_reduce_max_ps(v);
}
#endif
#endif

// out[i * stride + j] = SumLanes(v[i][j]).
template <int kRows, int kColumns, typename V, typename A>
CBAM_INLINE void SumLanesOfEach(const V (&v)[kRows][kColumns], A* out, int64_t stride) {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) out[i * stride + j] = SumLanes(v[i][j]);
  }
}
#if defined(CBAM_LEVEL_AVX512)
// The same sums with a third of the instructions, which would be as many as those of the dot
// products themselves where these are short.
CBAM_INLINE void SumLanesOfEach(const VF (&v)[4][4], float* out, int64_t stride) {
  __m512 column[4];  // [j]: four partial sums per row i, in the quarter i
  for (int j = 0; j < 4; ++j) {
    const auto halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    };
    const __m512 first = halves(v[0][j], v[1][j]), second = halves(v[2][j], v[3][j]);
    column[j] = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88),
                              _mm512_shuffle_f32x4(first, second, 0xDD));
  }
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d left = _mm512_castps_pd(pairs(column[0], column[1]));
  const __m512d right = _mm512_castps_pd(pairs(column[2], column[3]));
  const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
  _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
  _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(sums, 1));
  _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
  _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
}
#endif

// Keeps a value that was loaded in its register: GCC would load it again for each use as an operand
// in memory.
template <typename V>
CBAM_INLINE void KeepInRegister(V& value) {
#if defined(CBAM_LEVEL_AVX512)
  asm("" : "+v"(value));
#elif defined(__SSE2__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// --- Loads and stores ---

template <typename A>
CBAM_INLINE typename Simd<A>::V LoadPlain(const A* p) {
  typename Simd<A>::V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
CBAM_INLINE VF Load(const float* p) { return LoadPlain(p); }
CBAM_INLINE VD Load(const double* p) { return LoadPlain(p); }
CBAM_INLINE void Store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof(v)); }
CBAM_INLINE void Store(double* p, VD v) { __builtin_memcpy(p, &v, sizeof(v)); }

#if defined(CBAM_LEVEL_AVX512)
CBAM_INLINE VF FromHalves(const BFloat16*, __m256i h) {
  return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
CBAM_INLINE VF FromHalves(const Float16*, __m256i h) { return _mm512_cvtph_ps(h); }
#endif

CBAM_INLINE VF Load(const BFloat16* p) {
#if defined(CBAM_LEVEL_AVX512)
  return FromHalves(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CBAM_LEVEL_AVX2)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
  Simd<float>::H h;
  __builtin_memcpy(&h, p, sizeof(h));
  return (VF)(__builtin_convertvector(h, Simd<float>::U) << 16);
#endif
}

CBAM_INLINE Simd<float>::H ToBFloat16(VF v) {
  using U = Simd<float>::U;
  using I = Simd<float>::I;
  const U u = (U)v;
  // To nearest, ties to even; the upper halves are the result. A NaN stays one.
  const U rounded = u + (0x7fff + ((u >> 16) & 1));
  const U quiet = u | 0x400000;
#if defined(CBAM_LEVEL_AVX512)
  // The upper halves in one instruction: the odd ones of 32.
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                    17, 19, 21, 23, 25, 27, 29, 31};
  const I h = v != v ? (I)quiet : (I)rounded;
  return (Simd<float>::H)_mm512_castsi512_si256(
      _mm512_permutexvar_epi16(_mm512_load_si512(kOdd), (__m512i)h));
#else
  const U h = (U)Select((I)(v != v), (VF)quiet, (VF)rounded) >> 16;
#if defined(CBAM_LEVEL_AVX2)
  return (Simd<float>::H)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)h),
                                          _mm256_extracti128_si256((__m256i)h, 1));
#else
  return __builtin_convertvector(h, Simd<float>::H);
#endif
#endif
}
CBAM_INLINE void Store(BFloat16* p, VF v) {
  const Simd<float>::H h = ToBFloat16(v);
  __builtin_memcpy(p, &h, sizeof(h));
}

#if defined(CBAM_LEVEL_AVX512)
CBAM_INLINE VF Load(const Float16* p) {
  return FromHalves(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CBAM_INLINE __m256i ToHalves(const Float16*, VF v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
CBAM_INLINE __m256i ToHalves(const BFloat16*, VF v) { return (__m256i)ToBFloat16(v); }
CBAM_INLINE void Store(Float16* p, VF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ToHalves(p, v));
}
#elif defined(CBAM_LEVEL_AVX2)
CBAM_INLINE VF Load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CBAM_INLINE void Store(Float16* p, VF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
CBAM_INLINE VF Load(const Float16* p) {
  float16x4_t h;
  __builtin_memcpy(&h, p, sizeof(h));
  return vcvt_f32_f16(h);
}
CBAM_INLINE void Store(Float16* p, VF v) {
  const float16x4_t h = vcvt_f16_f32(v);
  __builtin_memcpy(p, &h, sizeof(h));
}
#else
CBAM_INLINE VF Load(const Float16* p) {
  using U = Simd<float>::U;
  using I = Simd<float>::I;
  Simd<float>::H h;
  __builtin_memcpy(&h, p, sizeof(h));
  const U u = __builtin_convertvector(h, U);
  const U magnitude = u & 0x7fff;
  const VF normal = (VF)((magnitude << 13) + (112u << 23));
  // Through the integer, since float denormals may be read as zero on the caller's threads.
  const VF denormal = __builtin_convertvector((I)magnitude, VF) * 0x1p-24f;
  const VF special = (VF)((magnitude << 13) | 0x7f800000u);
  VF v = Select((I)(magnitude < 0x400), denormal, normal);
  v = Select((I)(magnitude >= 0x7c00), special, v);
  return (VF)((U)v | ((u & 0x8000) << 16));
}
CBAM_INLINE void Store(Float16* p, VF v) {
  using U = Simd<float>::U;
  using I = Simd<float>::I;
  const U sign = (U)v & 0x80000000u;
  const U magnitude = (U)v & 0x7fffffffu;
  const U normal = (magnitude + (((15u - 127u) << 23) + 0xfff) + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the half's denormal, rounded, in the lowest bits.
  const U denormal = (U)((VF)magnitude + 0.5f) - 0x3f000000u;
  U h = (U)Select((I)(magnitude < (113u << 23)), (VF)denormal, (VF)normal);
  h = (U)Select((I)(magnitude >= 0x477ff000u), (VF)(U{} + 0x7c00u), (VF)h);
  h = (U)Select((I)(magnitude > 0x7f800000u), (VF)(U{} + 0x7e00u), (VF)h);
  const Simd<float>::H half = __builtin_convertvector(h | (sign >> 16), Simd<float>::H);
  __builtin_memcpy(p, &half, sizeof(half));
}
#endif

// The first n lanes, 0 < n < kLanes; the others are 0 (loads) or left alone (stores).
template <int64_t kCount, typename T>
CBAM_INLINE void CopyFirst(const T* from, int64_t n, T* to) {
  if constexpr (kCount > 0) {  // by powers of two, not one by one
    if (n & kCount) {
      __builtin_memcpy(to, from, kCount * sizeof(T));
      from += kCount;
      to += kCount;
    }
    CopyFirst<kCount / 2>(from, n, to);
  }
}
template <typename T>
CBAM_INLINE auto LoadFirst(const T* p, int64_t n) -> decltype(Load(p)) {
  constexpr int64_t kLanes = Simd<typename ScalarOf<decltype(Load(p))>::A>::kLanes;
  T lanes[kLanes] = {};
  CopyFirst<kLanes / 2>(p, n, lanes);
  return Load(lanes);
}
template <typename T, typename V>
CBAM_INLINE void StoreFirst(T* p, V v, int64_t n) {
  constexpr int64_t kLanes = Simd<typename ScalarOf<V>::A>::kLanes;
  T lanes[kLanes];
  Store(lanes, v);
  CopyFirst<kLanes / 2>(lanes, n, p);
}
#if defined(CBAM_LEVEL_AVX2)
CBAM_INLINE __m256i FirstMask32(int64_t n) {
  static const int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
}
template <>
CBAM_INLINE auto LoadFirst<float>(const float* p, int64_t n) -> decltype(Load(p)) {
  return _mm256_maskload_ps(p, FirstMask32(n));
}
template <>
CBAM_INLINE void StoreFirst<float, VF>(float* p, VF v, int64_t n) {
  _mm256_maskstore_ps(p, FirstMask32(n), v);
}
#elif defined(CBAM_LEVEL_AVX512)
CBAM_INLINE __mmask16 FirstMask16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
template <>
CBAM_INLINE auto LoadFirst<float>(const float* p, int64_t n) -> decltype(Load(p)) {
  return _mm512_maskz_loadu_ps(FirstMask16(n), p);
}
template <>
CBAM_INLINE void StoreFirst<float, VF>(float* p, VF v, int64_t n) {
  _mm512_mask_storeu_ps(p, FirstMask16(n), v);
}
#define CBAM_HALVES_FIRST(T)                                                  \
  template <>                                                                 \
  CBAM_INLINE auto LoadFirst<T>(const T* p, int64_t n) -> decltype(Load(p)) { \
    return FromHalves(p, _mm256_maskz_loadu_epi16(FirstMask16(n), p));        \
  }                                                                           \
  template <>                                                                 \
  CBAM_INLINE void StoreFirst<T, VF>(T * p, VF v, int64_t n) {                \
    _mm256_mask_storeu_epi16(p, FirstMask16(n), ToHalves(p, v));              \
  }
CBAM_HALVES_FIRST(Float16)
CBAM_HALVES_FIRST(BFloat16)
#undef CBAM_HALVES_FIRST
#endif

// All ones in the first n lanes.
template <typename A>
CBAM_INLINE typename Simd<A>::I FirstLanes(int64_t n) {
  typename Simd<A>::I lane;
  for (int64_t i = 0; i < Simd<A>::kLanes; ++i) lane[i] = i;
  using Scalar = decltype(lane[0] + 0);
  return lane < static_cast<Scalar>(n);
}

// Whether the caches are told of what processors could see coming. With AVX-512 that gained on an
// Intel Xeon; at the other levels it takes as many instructions for fewer bytes, and lost on a Zen 3
// (benchmarks/NOTES.md).
constexpr bool kTellsOfRuns = CBAM_VECTOR_BYTES == 64;

// Asks for what lies `elements` after p, which may be past the end of what p points into, to be in
// the second-level cache.
template <typename T>
CBAM_INLINE void FetchAhead(const T* p, int64_t elements) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) +
                                                   static_cast<size_t>(elements) * sizeof(T)),
                     0, 2);
}

// Past the caches, for outputs that will not be read before they are evicted. `p` must be aligned
// to what is stored.
CBAM_INLINE void Stream(float* p, VF v) {
#if defined(CBAM_LEVEL_AVX512)
  _mm512_stream_ps(p, v);
#elif defined(CBAM_LEVEL_AVX2)
  _mm256_stream_ps(p, v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, v);
#else
  Store(p, v);
#endif
}
CBAM_INLINE void Stream(double* p, VD v) {
#if defined(CBAM_LEVEL_AVX512)
  _mm512_stream_pd(p, v);
#elif defined(CBAM_LEVEL_AVX2)
  _mm256_stream_pd(p, v);
#elif defined(__SSE2__)
  _mm_stream_pd(p, v);
#else
  Store(p, v);
#endif
}
// A vector of halves is half as long.
template <typename T>
CBAM_INLINE void StreamHalves(T* p, VF v) {
#if defined(CBAM_LEVEL_AVX512)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), ToHalves(p, v));
#elif defined(CBAM_LEVEL_AVX2)
  alignas(16) T lanes[Simd<float>::kLanes];
  Store(lanes, v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                   _mm_load_si128(reinterpret_cast<__m128i*>(lanes)));
#else
  Store(p, v);
#endif
}
CBAM_INLINE void Stream(Float16* p, VF v) { StreamHalves(p, v); }
CBAM_INLINE void Stream(BFloat16* p, VF v) { StreamHalves(p, v); }
// Orders streamed stores before whatever tells another thread that they are done.
CBAM_INLINE void EndStream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- Scalars ---

template <typename T>
struct ComputeOf {
  using A = float;
};
template <>
struct ComputeOf<double> {
  using A = double;
};

// One element, through the first lane.
template <typename T>
CBAM_INLINE typename ComputeOf<T>::A ToCompute(T value) {
  return LoadFirst(&value, 1)[0];
}
CBAM_INLINE float ToCompute(float value) { return value; }
CBAM_INLINE double ToCompute(double value) { return value; }

}  // namespace
}  // namespace CBAM_LEVEL
}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_SIMD_H_
