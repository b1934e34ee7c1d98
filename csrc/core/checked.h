// Sizes that cannot wrap around.
#ifndef CBAM_OPS_CORE_CHECKED_H_
#define CBAM_OPS_CORE_CHECKED_H_

#include <cstddef>
#include <cstdint>

namespace cbam_ops {

// A count of elements or bytes, not negative. Products and sums that are too large for int64_t stay
// at its largest value, which no memory has; a factor of 0 makes any product 0.
class CheckedSize {
 public:
  constexpr CheckedSize(int64_t value) : value_(value) {}

  friend constexpr CheckedSize operator*(CheckedSize a, CheckedSize b) {
    int64_t product = 0;
    return __builtin_mul_overflow(a.value_, b.value_, &product) ? kLargest : product;
  }
  friend constexpr CheckedSize operator+(CheckedSize a, CheckedSize b) {
    int64_t sum = 0;
    return __builtin_add_overflow(a.value_, b.value_, &sum) ? kLargest : sum;
  }
  constexpr int64_t value() const { return value_; }

 private:
  static constexpr int64_t kLargest = INT64_MAX;
  int64_t value_;
};

// Hands out arrays of a workspace, each on a boundary of kAlignment bytes. With a null base it only
// counts, so one function both sizes and lays out.
template <int64_t kAlignment>
class WorkspaceArena {
 public:
  explicit WorkspaceArena(void* base) : base_(static_cast<char*>(base)) {}

  // An array of the product of `sizes` elements.
  template <typename T, typename... Sizes>
  T* Take(Sizes... sizes) {
    const CheckedSize bytes = (CheckedSize(sizes) * ... * CheckedSize(sizeof(T)));
    T* const array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_.value());
    bytes_ = bytes_ + (bytes + (kAlignment - 1)).value() / kAlignment * kAlignment;
    return array;
  }
  // Two such arrays, the second right behind the first.
  template <typename T, typename... Sizes>
  void TakePair(T* pair[2], Sizes... sizes) {
    pair[0] = Take<T>(2, sizes...);
    pair[1] = pair[0] == nullptr ? nullptr : pair[0] + (CheckedSize(sizes) * ...).value();
  }
  size_t bytes() const { return static_cast<size_t>(bytes_.value()); }

 private:
  char* base_;
  CheckedSize bytes_ = 0;
};

}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CHECKED_H_
