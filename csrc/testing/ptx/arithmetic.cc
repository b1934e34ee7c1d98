#include "testing/ptx/arithmetic.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

namespace cbam_ops {
namespace ptx {
namespace {

// ---- types --------------------------------------------------------------------------------------

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
template <typename H>
struct Pair {
  H low, high;
};

template <typename To, typename From>
To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
using Slot = std::conditional_t<sizeof(T) <= 4, uint32_t, uint64_t>;

template <typename T>
T FromSlot(Slot<T> slot) {
  T value;
  std::memcpy(&value, &slot, sizeof(value));
  return value;
}
template <typename T>
Slot<T> ToSlot(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<Slot<T>>(value);  // signs are extended
  } else {
    Slot<T> slot = 0;
    std::memcpy(&slot, &value, sizeof(value));
    return slot;
  }
}

template <typename T>
constexpr bool kIsFloat = std::is_floating_point_v<T>;
template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, F16> || std::is_same_v<T, BF16>;

float Widen(F16 half) {
  const uint32_t sign = (half.bits & 0x8000u) << 16, rest = half.bits & 0x7fffu;
  if (rest >= 0x7c00u) return Bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) return Bits<float>(sign | Bits<uint32_t>(static_cast<float>(rest) * 0x1p-24f));
  return Bits<float>(sign | ((rest << 13) + (112u << 23)));
}
float Widen(BF16 half) { return Bits<float>(static_cast<uint32_t>(half.bits) << 16); }
float Widen(float value) { return value; }
double Widen(double value) { return value; }

enum Rounding { kNearest, kZero, kDown, kUp };

// `value`, which may carry more digits than F has, rounded once. A value that itself was rounded to
// odd from a more exact one (see AddOdd) gives what the exact one would.
template <typename F>
F Narrow(double value, Rounding rounding);
template <>
double Narrow(double value, Rounding) {
  return value;
}
template <>
float Narrow(double value, Rounding rounding) {
  float near = static_cast<float>(value);
  const double back = near;
  if (rounding == kNearest || back == value || std::isnan(value)) return near;
  const bool up = rounding == kUp || (rounding == kZero && value < 0);
  if (up && back < value) near = std::nextafter(near, std::numeric_limits<float>::infinity());
  if (!up && back > value) near = std::nextafter(near, -std::numeric_limits<float>::infinity());
  return near;
}
// Of a half with `digits` binary digits, whose least normal exponent is `least`.
uint16_t NarrowHalf(double value, Rounding rounding, int digits, int least) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0;
  if (std::isnan(value)) return 0x7fff;
  const int exponent_bits = 16 - digits;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << (digits - 1);
  double magnitude = std::fabs(value);
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  if (std::isinf(magnitude)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = std::max(std::ilogb(magnitude), least);
  const double scaled = std::ldexp(magnitude, digits - 1 - exponent);  // below 2^digits
  const bool up = (rounding == kUp && sign == 0) || (rounding == kDown && sign != 0);
  const double whole = rounding == kNearest ? std::nearbyint(scaled)
                       : up                 ? std::ceil(scaled)
                                            : std::floor(scaled);
  // The leading digit of a normal number carries into the exponent.
  const uint32_t bits =
      (static_cast<uint32_t>(exponent - least) << (digits - 1)) + static_cast<uint32_t>(whole);
  const bool overflows = bits >= infinity;
  const bool stays_finite = overflows && rounding != kNearest && !up;
  return static_cast<uint16_t>(sign | (stays_finite ? infinity - 1 : overflows ? infinity : bits));
}
template <>
F16 Narrow(double value, Rounding rounding) {
  return {NarrowHalf(value, rounding, 11, -14)};
}
template <>
BF16 Narrow(double value, Rounding rounding) {
  return {NarrowHalf(value, rounding, 8, -126)};
}

// a + b rounded to odd: enough for a second rounding to a shorter type to be right.
double AddOdd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double a_part = sum - b, error = (a - a_part) + (b - (sum - a_part));
  if (error == 0 || (Bits<uint64_t>(sum) & 1) != 0) return sum;
  const double infinity = std::numeric_limits<double>::infinity();
  return std::nextafter(sum, error > 0 ? infinity : -infinity);
}

template <typename T>
T Canonical(T value) {
  if constexpr (std::is_same_v<T, float>) {
    return value == value ? value : Bits<float>(0x7fffffffu);
  } else {
    return value == value ? value : Bits<double>(uint64_t{0x7ff8} << 48);
  }
}

// ---- loops over lanes ---------------------------------------------------------------------------

template <typename Body>
inline void EachLane(uint32_t mask, const Body& body) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) body(i);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      if ((mask >> i & 1) != 0) body(i);
    }
  }
}

template <typename T>
const Slot<T>* In(const char* lanes) {
  return reinterpret_cast<const Slot<T>*>(lanes);
}

// F::Do(A) -> D and its like.
template <typename F, typename D, typename A>
void One(const Lanes& l) {
  auto* const d = reinterpret_cast<Slot<D>*>(l.d);
  const auto* const a = In<A>(l.a);
  EachLane(l.mask, [=](int i) { d[i] = ToSlot<D>(F::template Do<D>(FromSlot<A>(a[i]))); });
}
template <typename F, typename D, typename A, typename B>
void Two(const Lanes& l) {
  auto* const d = reinterpret_cast<Slot<D>*>(l.d);
  const auto* const a = In<A>(l.a);
  const auto* const b = In<B>(l.b);
  EachLane(l.mask, [=](int i) {
    d[i] = ToSlot<D>(F::template Do<D>(FromSlot<A>(a[i]), FromSlot<B>(b[i])));
  });
}
template <typename F, typename D, typename A, typename B, typename C>
void Three(const Lanes& l) {
  auto* const d = reinterpret_cast<Slot<D>*>(l.d);
  const auto* const a = In<A>(l.a);
  const auto* const b = In<B>(l.b);
  const auto* const c = In<C>(l.c);
  EachLane(l.mask, [=](int i) {
    d[i] = ToSlot<D>(F::template Do<D>(FromSlot<A>(a[i]), FromSlot<B>(b[i]), FromSlot<C>(c[i])));
  });
}

// The same with what `mode` says of a float32 operation.
enum Mode { kFlush = 4, kSaturate = 8, kRoundingMask = 3 };

float Flush(float value, int mode) {
  return (mode & kFlush) != 0 && std::fabs(value) < std::numeric_limits<float>::min()
             ? std::copysign(0.0f, value)
             : value;
}
float Finish(float value, int mode) {
  value = Flush(value, mode);
  if ((mode & kSaturate) == 0) return value;
  return value > 0 ? std::fmin(value, 1.0f) : 0.0f;  // NaN to 0
}
template <typename F, int kSources>
void Moded(const Lanes& l) {
  auto* const d = reinterpret_cast<uint32_t*>(l.d);
  const auto value = [](const char* lanes, int i, int mode) {
    return Flush(Bits<float>(reinterpret_cast<const uint32_t*>(lanes)[i]), mode);
  };
  EachLane(l.mask, [&](int i) {
    const auto rounding = static_cast<Rounding>(l.mode & kRoundingMask);
    const float a = value(l.a, i, l.mode);
    float result;
    if constexpr (kSources == 1) {
      result = F::Round(a, rounding);
    } else if constexpr (kSources == 2) {
      result = F::Round(a, value(l.b, i, l.mode), rounding);
    } else {
      result = F::Round(a, value(l.b, i, l.mode), value(l.c, i, l.mode), rounding);
    }
    d[i] = Bits<uint32_t>(Finish(Canonical(result), l.mode));
  });
}

// ---- operations ---------------------------------------------------------------------------------

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

struct Add {
  template <typename D, typename T>
  static D Do(T a, T b) {
    if constexpr (kIsFloat<T>) return Canonical(a + b);
    if constexpr (std::is_integral_v<T>)
      return static_cast<D>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
  }
  static float Round(float a, float b, Rounding r) { return Narrow<float>(AddOdd(a, b), r); }
};
struct Sub {
  template <typename D, typename T>
  static D Do(T a, T b) {
    if constexpr (kIsFloat<T>) return Canonical(a - b);
    if constexpr (std::is_integral_v<T>)
      return static_cast<D>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
  }
  static float Round(float a, float b, Rounding r) { return Add::Round(a, -b, r); }
};
struct Mul {  // the low half of integers
  template <typename D, typename T>
  static D Do(T a, T b) {
    if constexpr (kIsFloat<T>) return Canonical(a * b);
    if constexpr (std::is_integral_v<T>)
      return static_cast<D>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
  static float Round(float a, float b, Rounding r) {
    return Narrow<float>(static_cast<double>(a) * b, r);
  }
};
struct Wide {
  template <typename D, typename T>
  static D Do(T a, T b) {
    return static_cast<D>(static_cast<D>(a) * static_cast<D>(b));
  }
};
struct High {
  template <typename D, typename T>
  static D Do(T a, T b) {
    using Twice = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<D>((static_cast<Twice>(a) * static_cast<Twice>(b)) >> (8 * sizeof(T)));
  }
};
template <typename Product>
struct MulAdd {
  template <typename D, typename T>
  static D Do(T a, T b, D c) {
    return Add::Do<D>(Product::template Do<D>(a, b), c);
  }
};
struct Fma {
  template <typename D, typename T>
  static D Do(T a, T b, T c) {
    return Canonical(std::fma(a, b, c));
  }
  static float Round(float a, float b, float c, Rounding r) {
    return Narrow<float>(AddOdd(static_cast<double>(a) * b, c), r);
  }
};
struct Div {
  template <typename D, typename T>
  static D Do(T a, T b) {
    if constexpr (kIsFloat<T>) {
      return Canonical(a / b);
    } else {
      if (b == 0) return static_cast<D>(~T{0});
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub::Do<D>(T{0}, a);
      return static_cast<D>(a / b);
    }
  }
  static float Round(float a, float b, Rounding) { return a / b; }
};
struct Rem {
  template <typename D, typename T>
  static D Do(T a, T b) {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
  }
};
template <bool kMaximum, bool kNan>
struct Extreme {
  template <typename D, typename T>
  static D Do(T a, T b) {
    if constexpr (kIsFloat<T>) {
      if (std::isnan(a)) return Canonical(kNan ? a : b);
      if (std::isnan(b)) return Canonical(kNan ? b : a);
      if (a == b) return std::signbit(a) == kMaximum ? b : a;  // -0 is below +0
    }
    return (a < b) == kMaximum ? b : a;
  }
  static float Round(float a, float b, Rounding) { return Do<float>(a, b); }
};
struct Neg {
  template <typename D, typename T>
  static D Do(T a) {
    if constexpr (kIsFloat<T>) return -a;
    if constexpr (std::is_integral_v<T>) return Sub::Do<D>(T{0}, a);
  }
  static float Round(float a, Rounding) { return -a; }
};
struct Abs {
  template <typename D, typename T>
  static D Do(T a) {
    if constexpr (kIsFloat<T>) return std::fabs(a);
    if constexpr (std::is_integral_v<T>) return a < 0 ? Sub::Do<D>(T{0}, a) : a;
  }
  static float Round(float a, Rounding) { return std::fabs(a); }
};
// Functions of one float, computed in twice the digits.
#define CBAM_OPS_PTX_FUNCTION(Name, expression)     \
  struct Name {                                     \
    template <typename D, typename T>               \
    static D Do(T a) {                              \
      const double x = a;                           \
      return Canonical(static_cast<D>(expression)); \
    }                                               \
    static float Round(float a, Rounding r) {       \
      const double x = a;                           \
      return Narrow<float>(expression, r);          \
    }                                               \
  };
CBAM_OPS_PTX_FUNCTION(Sqrt, std::sqrt(x))
CBAM_OPS_PTX_FUNCTION(Rcp, 1 / x)
CBAM_OPS_PTX_FUNCTION(Ex2, std::exp2(x))
#undef CBAM_OPS_PTX_FUNCTION

#define CBAM_OPS_PTX_BITS(Name, parameters, expression) \
  struct Name {                                         \
    template <typename D, typename T>                   \
    static D Do parameters {                            \
      return static_cast<D>(expression);                \
    }                                                   \
  };
CBAM_OPS_PTX_BITS(And, (T a, T b), a& b)
CBAM_OPS_PTX_BITS(Or, (T a, T b), a | b)
CBAM_OPS_PTX_BITS(Xor, (T a, T b), a ^ b)
CBAM_OPS_PTX_BITS(Not, (T a), ~a)
CBAM_OPS_PTX_BITS(Mov, (T a), a)
#undef CBAM_OPS_PTX_BITS
struct Shl {
  template <typename D, typename T>
  static D Do(T a, uint32_t by) {
    return by >= 8 * sizeof(T) ? 0 : static_cast<D>(a << by);
  }
};
struct Shr {
  template <typename D, typename T>
  static D Do(T a, uint32_t by) {
    const uint32_t most = 8 * sizeof(T) - 1;
    if (by > most) return std::is_signed_v<T> ? static_cast<D>(a >> most) : 0;
    return static_cast<D>(a >> by);
  }
};
struct Prmt {
  template <typename D>
  static D Do(uint32_t a, uint32_t b, uint32_t selection) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t which = selection >> (4 * i) & 15;
      uint32_t byte = static_cast<uint32_t>(both >> (8 * (which & 7))) & 255u;
      if (which >= 8) byte = (byte & 0x80u) != 0 ? 255u : 0;
      result |= byte << (8 * i);
    }
    return result;
  }
};

// Puts the first bits of a into b.
template <typename T>
void Insert(const Lanes& l) {
  auto* const d = reinterpret_cast<T*>(l.d);
  EachLane(l.mask, [&](int i) {
    constexpr uint32_t most = 8 * sizeof(T);
    const uint32_t from = In<uint32_t>(l.c)[i] & 255, count = In<uint32_t>(l.e)[i] & 255;
    const T ones = count >= most ? ~T{0} : (T{1} << count) - 1;
    const T field = from >= most ? 0 : ones << from;
    const T shifted = from >= most ? 0 : In<T>(l.a)[i] << from;
    d[i] = (In<T>(l.b)[i] & ~field) | (shifted & field);
  });
}

// ---- predicates ---------------------------------------------------------------------------------

uint32_t Mask(const char* predicate) { return *reinterpret_cast<const uint32_t*>(predicate); }
void StoreMask(const Lanes& l, uint32_t value) {
  auto* const d = reinterpret_cast<uint32_t*>(l.d);
  *d = (*d & ~l.mask) | (value & l.mask);
}
template <typename F>
void OnMasks(const Lanes& l) {
  StoreMask(l, F::template Do<uint32_t>(Mask(l.a), Mask(l.b)));
}
void NotMask(const Lanes& l) { StoreMask(l, ~Mask(l.a)); }
void MoveMask(const Lanes& l) { StoreMask(l, Mask(l.a)); }

template <typename T>
void Select(const Lanes& l) {
  const uint32_t choice = Mask(l.c);
  auto* const d = reinterpret_cast<T*>(l.d);
  EachLane(l.mask, [&](int i) {
    d[i] = (choice >> i & 1) != 0 ? reinterpret_cast<const T*>(l.a)[i]
                                  : reinterpret_cast<const T*>(l.b)[i];
  });
}

// Comparisons of setp: `mode` says what is done with the predicate c, and whether the complement is
// wanted (of the comparison, before c).
enum CompareMode { kAlone, kAnd, kOr, kXor, kComplement };

enum class Compare { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
template <Compare kCompare, typename T>
bool Holds(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (kCompare) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return a != b && !unordered;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    case Compare::kGe:
      return a >= b;
    case Compare::kEqu:
      return a == b || unordered;
    case Compare::kNeu:
      return a != b;
    case Compare::kLtu:
      return !(a >= b);
    case Compare::kLeu:
      return !(a > b);
    case Compare::kGtu:
      return !(a <= b);
    case Compare::kGeu:
      return !(a < b);
    case Compare::kNum:
      return !unordered;
    case Compare::kNan:
      return unordered;
  }
}
template <Compare kCompare, typename T>
void SetPredicate(const Lanes& l) {
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) {
    const bool holds = Holds<kCompare>(FromSlot<T>(In<T>(l.a)[i]), FromSlot<T>(In<T>(l.b)[i]));
    result |= static_cast<uint32_t>(holds) << i;
  }
  if ((l.mode & kComplement) != 0) result = ~result;
  switch (l.mode & 3) {
    case kAnd:
      result &= Mask(l.c);
      break;
    case kOr:
      result |= Mask(l.c);
      break;
    case kXor:
      result ^= Mask(l.c);
      break;
    default:
      break;
  }
  StoreMask(l, result);
}

// ---- conversions --------------------------------------------------------------------------------

// Of `mode`: a rounding, kFlush, kSaturate, and whether a float is rounded to a whole number.
constexpr int kWhole = 16;

template <typename T>
T RoundWhole(T value, int mode) {
  switch (mode & kRoundingMask) {
    case kZero:
      return std::trunc(value);
    case kDown:
      return std::floor(value);
    case kUp:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}
template <typename D, typename S>
D ConvertOne(S source, int mode) {
  if constexpr (std::is_integral_v<S> && std::is_integral_v<D>) {
    if ((mode & kSaturate) != 0) {
      const __int128 wide = source, low = std::numeric_limits<D>::min(),
                     high = std::numeric_limits<D>::max();
      return static_cast<D>(wide < low ? low : wide > high ? high : wide);
    }
    return static_cast<D>(source);
  } else if constexpr (std::is_integral_v<S>) {
    if constexpr (kIsHalf<D>) return Narrow<D>(static_cast<double>(source), kNearest);
    if constexpr (!kIsHalf<D>) return static_cast<D>(source);
  } else if constexpr (std::is_integral_v<D>) {
    auto value = Widen(source);
    if constexpr (std::is_same_v<S, float>) value = Flush(value, mode);
    // Not a number: 0, or with 64 bits on either side the highest bit.
    if (value != value)
      return sizeof(D) == 8 || sizeof(S) == 8 ? static_cast<D>(uint64_t{1} << (8 * sizeof(D) - 1))
                                              : D{0};
    const double whole = RoundWhole<double>(value, mode);
    if (whole <= static_cast<double>(std::numeric_limits<D>::min()))
      return std::numeric_limits<D>::min();
    if (whole >= static_cast<double>(std::numeric_limits<D>::max()))
      return std::numeric_limits<D>::max();
    return static_cast<D>(whole);
  } else {
    double value = Widen(source);
    if constexpr (std::is_same_v<S, float>) value = Flush(Widen(source), mode);
    if ((mode & kWhole) != 0) value = RoundWhole(value, mode);
    if ((mode & kSaturate) != 0) value = value > 0 ? std::fmin(value, 1.0) : 0.0;
    const auto rounding =
        (mode & kWhole) != 0 ? kNearest : static_cast<Rounding>(mode & kRoundingMask);
    const D narrow = Narrow<D>(value, rounding);
    if constexpr (kIsHalf<D>) return narrow;
    if constexpr (std::is_same_v<D, float>) return Flush(Canonical(narrow), mode);
    if constexpr (std::is_same_v<D, double>) return Canonical(narrow);
  }
}
template <>
BF16 ConvertOne<BF16>(float source, int mode) {  // often, so fast
  if (mode != 0) return Narrow<BF16>(Flush(source, mode), static_cast<Rounding>(mode & 3));
  const auto bits = Bits<uint32_t>(source);
  if (source != source) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <typename D, typename S>
void Convert(const Lanes& l) {
  auto* const d = reinterpret_cast<Slot<D>*>(l.d);
  const auto* const a = In<S>(l.a);
  if (l.mode == 0) {
    EachLane(l.mask, [=](int i) { d[i] = ToSlot<D>(ConvertOne<D>(FromSlot<S>(a[i]), 0)); });
  } else {
    const int mode = l.mode;
    EachLane(l.mask, [=](int i) { d[i] = ToSlot<D>(ConvertOne<D>(FromSlot<S>(a[i]), mode)); });
  }
}
// Two float32 into one register: the first is the upper half.
template <typename H>
struct Pack {
  template <typename D>
  static D Do(float high, float low) {
    return {ConvertOne<H>(low, 0), ConvertOne<H>(high, 0)};
  }
};

// ---- from opcodes -------------------------------------------------------------------------------

// Calls `use` with a value of the type that a word names.
template <typename Use>
bool WithInteger(const std::string& type, const Use& use) {
  if (type == "u16" || type == "b16") return use(uint16_t{}), true;
  if (type == "s16") return use(int16_t{}), true;
  if (type == "u32" || type == "b32") return use(uint32_t{}), true;
  if (type == "s32") return use(int32_t{}), true;
  if (type == "u64" || type == "b64") return use(uint64_t{}), true;
  if (type == "s64") return use(int64_t{}), true;
  return false;
}
template <typename Use>
bool WithHalf(const std::string& type, const Use& use) {
  if (type == "f16") return use(F16{}), true;
  if (type == "bf16") return use(BF16{}), true;
  return false;
}
template <typename Use>
bool WithFloat(const std::string& type, const Use& use) {
  if (type == "f32") return use(float{}), true;
  if (type == "f64") return use(double{}), true;
  return false;
}
template <typename Use>
bool WithNumber(const std::string& type, const Use& use) {
  return WithInteger(type, use) || WithFloat(type, use);
}

template <typename F, typename T, int kSources>
constexpr LaneFunction Same() {  // all operands of one type
  if constexpr (kSources == 1) return &One<F, T, T>;
  if constexpr (kSources == 2) return &Two<F, T, T, T>;
  if constexpr (kSources == 3) return &Three<F, T, T, T, T>;
}

const char* FamilyOf(const std::string& type) {
  return type == "f32" ? "float32" : type == "f64" ? "float64" : "integer";
}

// `whole`: whether it is a rounding to whole numbers.
Rounding TakeRounding(Words* words, bool* whole = nullptr) {
  const char* const names[] = {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"};
  for (int i = 0; i < (whole != nullptr ? 8 : 4); ++i) {
    if (!words->Take(names[i])) continue;
    if (whole != nullptr) *whole = i >= 4;
    return static_cast<Rounding>(i % 4);
  }
  return kNearest;
}

class Finder {
 public:
  explicit Finder(const std::string& opcode) : words_(opcode), name_(words_.front()) {
    words_.Take(name_);
  }

  Operation Find() {
    if (name_ == "setp") {
      FindComparison();
    } else if (name_ == "cvt") {
      FindConversion();
    } else {
      type_ = words_.TakeType();
      found_.family = FamilyOf(type_);
      if (type_ == "pred") {
        FindOnPredicates();
      } else {
        FindOnTypes();
      }
    }
    if (!words_.Empty()) found_.function = nullptr;
    return found_;
  }

 private:
  void Set(LaneFunction function, const std::string& d, std::vector<std::string> sources) {
    found_.function = function;
    found_.d = LaneBytes(d);
    for (const std::string& source : sources) found_.sources.push_back(LaneBytes(source));
  }

  void FindOnPredicates() {
    found_.family = "integer";
    if (name_ == "and") Set(&OnMasks<And>, "pred", {"pred", "pred"});
    if (name_ == "or") Set(&OnMasks<Or>, "pred", {"pred", "pred"});
    if (name_ == "xor") Set(&OnMasks<Xor>, "pred", {"pred", "pred"});
    if (name_ == "not") Set(&NotMask, "pred", {"pred"});
    if (name_ == "mov") Set(&MoveMask, "pred", {"pred"});
  }

  // An operation on floats, all operands of one type.
  template <typename F, int kSources>
  void SetFloats() {
    const std::vector<std::string> sources(kSources, type_);
    found_.mode = TakeRounding(&words_);
    if (words_.Take("ftz")) found_.mode |= kFlush;
    if (words_.Take("sat")) found_.mode |= kSaturate;
    if (type_ == "f32") {
      Set(found_.mode == 0 ? Same<F, float, kSources>() : &Moded<F, kSources>, type_, sources);
    } else if (type_ == "f64" && found_.mode == 0) {
      Set(Same<F, double, kSources>(), type_, sources);
    }
  }
  template <typename F, int kSources>
  void SetIntegers() {
    WithInteger(type_, [&](auto t) {
      Set(Same<F, decltype(t), kSources>(), type_, std::vector<std::string>(kSources, type_));
    });
  }
  template <typename F>
  void SetFunction() {
    found_.family = "special";
    words_.Take("approx");
    SetFloats<F, 1>();
  }
  template <typename F>
  void SetShift() {
    WithInteger(type_, [&](auto t) {
      Set(&Two<F, decltype(t), decltype(t), uint32_t>, type_, {type_, "u32"});
    });
  }
  // mul and mad, by which half of the product they take.
  template <typename F, template <typename> class Of, int kSources>
  void SetProduct() {
    WithInteger(type_, [&](auto t) {
      Set(Same<Of<F>, decltype(t), kSources>(), type_, std::vector<std::string>(kSources, type_));
    });
  }
  template <typename F>
  using Itself = F;

  template <template <typename> class Of, int kSources>
  void FindProduct() {
    if (words_.Take("lo")) return SetProduct<Mul, Of, kSources>();
    if (words_.Take("hi")) return SetProduct<High, Of, kSources>();
    if (!words_.Take("wide")) return;
    const std::string twice = type_.substr(0, 1) + (type_.substr(1) == "16" ? "32" : "64");
    const auto set = [&](auto t, auto wide) {
      using T = decltype(t);
      using W = decltype(wide);
      if constexpr (kSources == 2) Set(&Two<Wide, W, T, T>, twice, {type_, type_});
      if constexpr (kSources == 3)
        Set(&Three<MulAdd<Wide>, W, T, T, W>, twice, {type_, type_, twice});
    };
    if (type_ == "u16") set(uint16_t{}, uint32_t{});
    if (type_ == "s16") set(int16_t{}, int32_t{});
    if (type_ == "u32") set(uint32_t{}, uint64_t{});
    if (type_ == "s32") set(int32_t{}, int64_t{});
  }

  void FindOnTypes() {
    const bool is_float = type_.find('f') != std::string::npos;
    if (name_ == "add") return is_float ? SetFloats<Add, 2>() : SetIntegers<Add, 2>();
    if (name_ == "sub") return is_float ? SetFloats<Sub, 2>() : SetIntegers<Sub, 2>();
    if (name_ == "neg") return is_float ? SetFloats<Neg, 1>() : SetIntegers<Neg, 1>();
    if (name_ == "abs") return is_float ? SetFloats<Abs, 1>() : SetIntegers<Abs, 1>();
    if (name_ == "mul") return is_float ? SetFloats<Mul, 2>() : FindProduct<Itself, 2>();
    if (name_ == "mad" && !is_float) return FindProduct<MulAdd, 3>();
    if (name_ == "fma" || name_ == "mad") return SetFloats<Fma, 3>();
    if (name_ == "min" || name_ == "max") {
      if (!is_float)
        return name_ == "min" ? SetIntegers<Extreme<false, false>, 2>()
                              : SetIntegers<Extreme<true, false>, 2>();
      if (words_.Take("NaN"))
        return name_ == "min" ? SetFloats<Extreme<false, true>, 2>()
                              : SetFloats<Extreme<true, true>, 2>();
      return name_ == "min" ? SetFloats<Extreme<false, false>, 2>()
                            : SetFloats<Extreme<true, false>, 2>();
    }
    if (name_ == "div") {
      found_.family = "division";
      if (!is_float) return SetIntegers<Div, 2>();
      if (words_.Take("full") || words_.Take("approx")) found_.family = "special";
      return SetFloats<Div, 2>();
    }
    if (name_ == "rem") {
      found_.family = "division";
      return SetIntegers<Rem, 2>();
    }
    if (name_ == "sqrt") return SetFunction<Sqrt>();
    if (name_ == "rcp") return SetFunction<Rcp>();
    if (name_ == "ex2") return SetFunction<Ex2>();
    if (name_ == "and") return SetIntegers<And, 2>();
    if (name_ == "or") return SetIntegers<Or, 2>();
    if (name_ == "xor") return SetIntegers<Xor, 2>();
    if (name_ == "not") return SetIntegers<Not, 1>();
    if (name_ == "shl") return SetShift<Shl>();
    if (name_ == "shr") return SetShift<Shr>();
    if (name_ == "bfi") {
      const std::vector<std::string> sources = {type_, type_, "u32", "u32"};
      if (type_ == "b32") Set(&Insert<uint32_t>, type_, sources);
      if (type_ == "b64") Set(&Insert<uint64_t>, type_, sources);
    }
    if (name_ == "prmt" && type_ == "b32")
      Set(&Three<Prmt, uint32_t, uint32_t, uint32_t, uint32_t>, type_, {type_, type_, type_});
    if (name_ == "selp") {
      found_.family = "integer";
      if (LaneBytes(type_) == 8) return Set(&Select<uint64_t>, type_, {type_, type_, "pred"});
      return Set(&Select<uint32_t>, type_, {type_, type_, "pred"});
    }
    if (name_ == "mov") {
      found_.family = "move";
      if (LaneBytes(type_) == 8) return Set(&One<Mov, uint64_t, uint64_t>, type_, {type_});
      return Set(&One<Mov, uint32_t, uint32_t>, type_, {type_});
    }
  }

  template <typename T>
  LaneFunction ComparisonOf() {
#define CBAM_OPS_PTX_COMPARE(word, Which) \
  if (words_.Take(word)) return &SetPredicate<Compare::Which, T>;
    CBAM_OPS_PTX_COMPARE("eq", kEq)
    // Of integers too: nothing is unordered there. lo, ls, hi, hs are the unsigned names.
    CBAM_OPS_PTX_COMPARE("ne", kNe)
    CBAM_OPS_PTX_COMPARE("lt", kLt)
    CBAM_OPS_PTX_COMPARE("le", kLe)
    CBAM_OPS_PTX_COMPARE("gt", kGt)
    CBAM_OPS_PTX_COMPARE("ge", kGe)
    CBAM_OPS_PTX_COMPARE("lo", kLt)
    CBAM_OPS_PTX_COMPARE("ls", kLe)
    CBAM_OPS_PTX_COMPARE("hi", kGt)
    CBAM_OPS_PTX_COMPARE("hs", kGe)
    if constexpr (!std::is_integral_v<T>) {
      CBAM_OPS_PTX_COMPARE("equ", kEqu)
      CBAM_OPS_PTX_COMPARE("neu", kNeu)
      CBAM_OPS_PTX_COMPARE("ltu", kLtu)
      CBAM_OPS_PTX_COMPARE("leu", kLeu)
      CBAM_OPS_PTX_COMPARE("gtu", kGtu)
      CBAM_OPS_PTX_COMPARE("geu", kGeu)
      CBAM_OPS_PTX_COMPARE("num", kNum)
      CBAM_OPS_PTX_COMPARE("nan", kNan)
    }
#undef CBAM_OPS_PTX_COMPARE
    return nullptr;
  }

  void FindComparison() {
    const std::string type = words_.TakeType();
    found_.family = FamilyOf(type);
    WithNumber(type, [&](auto t) {
      std::vector<std::string> sources = {type, type};
      const char* const combine[] = {"", "and", "or", "xor"};
      for (int i = 1; i < 4; ++i) {
        if (!words_.Take(combine[i])) continue;
        found_.mode = i;
        sources.emplace_back("pred");
      }
      Set(ComparisonOf<decltype(t)>(), "pred", sources);
    });
  }

  void FindConversion() {
    found_.family = "conversion";
    const std::string source = words_.TakeType(), to = words_.TakeType();
    if (to == "f16x2" || to == "bf16x2") {
      words_.Take("rn");
      if (source != "f32") return;
      if (to == "f16x2") Set(&Two<Pack<F16>, Pair<F16>, float, float>, to, {source, source});
      if (to == "bf16x2") Set(&Two<Pack<BF16>, Pair<BF16>, float, float>, to, {source, source});
      return;
    }
    bool whole = false;
    found_.mode = TakeRounding(&words_, &whole);
    if (whole) found_.mode |= kWhole;
    if (words_.Take("ftz")) found_.mode |= kFlush;
    if (words_.Take("sat")) found_.mode |= kSaturate;
    WithConvertible(to, [&](auto d) {
      WithConvertible(source, [&](auto s) {
        // From integers only to the nearest.
        if (std::is_integral_v<decltype(s)> && (found_.mode & kRoundingMask) != 0) return;
        Set(&Convert<decltype(d), decltype(s)>, to, {source});
      });
    });
  }
  template <typename Use>
  static void WithConvertible(const std::string& type, const Use& use) {
    if (type == "u8") use(uint8_t{});
    if (type == "s8") use(int8_t{});
    WithNumber(type, use) || WithHalf(type, use);
  }

  Words words_;
  std::string name_, type_;
  Operation found_;
};

}  // namespace

int BytesOfType(const std::string& type) {
  if (type == "pred") return 0;
  if (type == "f16x2" || type == "bf16x2") return 4;
  return std::atoi(type.c_str() + type.find_first_of("0123456789")) / 8;
}
int LaneBytes(const std::string& type) {
  const int bytes = BytesOfType(type);
  return bytes == 0 ? 0 : bytes <= 4 ? 4 : 8;
}

Words::Words(const std::string& opcode) {
  for (size_t begin = 0; begin <= opcode.size();) {
    const size_t end = std::min(opcode.find('.', begin), opcode.size());
    words_.push_back(opcode.substr(begin, end - begin));
    begin = end + 1;
  }
}
bool Words::Take(const std::string& word) {
  for (size_t i = 0; i < words_.size(); ++i) {
    if (words_[i] != word) continue;
    words_.erase(words_.begin() + static_cast<std::ptrdiff_t>(i));
    return true;
  }
  return false;
}
std::string Words::TakeType() {
  static const char* const kTypes[] = {"pred", "b8",  "u8",  "s8",    "b16",   "u16", "s16",
                                       "b32",  "u32", "s32", "b64",   "u64",   "s64", "f16",
                                       "bf16", "f32", "f64", "f16x2", "bf16x2"};
  for (size_t i = words_.size(); i-- > 0;) {
    for (const char* type : kTypes) {
      if (words_[i] != type) continue;
      words_.erase(words_.begin() + static_cast<std::ptrdiff_t>(i));
      return type;
    }
  }
  return "";
}

Operation FindOperation(const std::string& opcode) { return Finder(opcode).Find(); }

}  // namespace ptx
}  // namespace cbam_ops
