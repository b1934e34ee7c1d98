// The sizes of an op's named dimensions, learnt from one argument after the other: the check of
// shapes for shape functions, for kernels on any device and for lowerings.
#ifndef CBAM_OPS_OPS_DIMENSIONS_H_
#define CBAM_OPS_OPS_DIMENSIONS_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/contract.h"
#include "ops/signature.h"

namespace cbam_ops {
namespace ops {

inline constexpr int64_t kUnknown = -1;

std::string Name(Dim dim);  // "N", "hidden", ...

struct Shape {
  int rank = 0;
  int64_t sizes[kMaxRank] = {};

  const int64_t* data() const { return sizes; }
  size_t size() const { return static_cast<size_t>(rank); }
  const int64_t* begin() const { return sizes; }
  const int64_t* end() const { return sizes + rank; }
};

class Dimensions {
 public:
  // Of a problem only the options are read.
  explicit Dimensions(const Problem& options);

  // Checks that the sizes of an argument, some of which may be kUnknown, fit what is known already,
  // and learns from them. Maps are those of an image or of a volume, as the first argument that has
  // the rank of either says. Returns what is wrong as text without the op's name, or nothing.
  std::string Learn(const Argument& argument, const int64_t* sizes, int rank);

  // The shape of an argument, with kUnknown where nothing is known.
  Shape ShapeOf(const Argument& argument) const;

  // The options together with the sizes, all of which must be known.
  Problem ToProblem() const;

 private:
  int64_t Size(Dim dim) const;
  // The dimensions that an argument of a volume or an image has, in the order of the layout.
  Dims DimsOf(const Argument& argument, bool is_volume) const;
  std::string Misfit(const Argument& argument, const int64_t* sizes, int rank) const;

  const Problem options_;
  int64_t sizes_[kBoundDims];
  bool rank_is_known_ = false;
  bool is_volume_ = false;
};

}  // namespace ops
}  // namespace cbam_ops

#endif  // CBAM_OPS_OPS_DIMENSIONS_H_
