#include "ops/dimensions.h"

#include <algorithm>
#include <string>

namespace cbam_ops {
namespace ops {
std::string Name(Dim dim) {
  static constexpr const char* kNames[] = {"N",  "H",  "W",          "C", "hidden",
                                           "kh", "kw", "statistics", "1", "2"};
  return kNames[static_cast<int>(dim)];
}

namespace {

// "[a, b, c]".
template <typename Text>
std::string List(int rank, const Text& text) {
  std::string list = "[";
  for (int i = 0; i < rank; ++i) list += (i > 0 ? ", " : "") + text(i);
  return list + "]";
}

std::string ToText(const int64_t* sizes, int rank) {
  return List(rank, [sizes](int i) {
    return sizes[i] == kUnknown ? std::string("?") : std::to_string(sizes[i]);
  });
}

// Dimension i in the order of the layout.
Dim InLayout(const Dims& dims, Layout layout, int i) {
  static constexpr int kChannelsFirst[] = {0, 3, 1, 2};
  return dims.dims[dims.is_map && layout == Layout::kNCHW ? kChannelsFirst[i] : i];
}

}  // namespace

Dimensions::Dimensions(const Problem& options) : options_(options) {
  std::fill(sizes_, sizes_ + kBoundDims, kUnknown);
}

int64_t Dimensions::Size(Dim dim) const {
  switch (dim) {
    case Dim::kOne:
      return 1;
    case Dim::kTwo:
      return 2;
    case Dim::kStatistics:
      return options_.batch_norm ? 2 : 0;
    default:
      return sizes_[static_cast<int>(dim)];
  }
}

std::string Dimensions::Misfit(const Argument& argument, const int64_t* sizes, int rank) const {
  const auto name = [&](int i) { return Name(InLayout(argument.dims, options_.layout, i)); };
  const auto known = [&](int i) {
    const int64_t size = Size(InLayout(argument.dims, options_.layout, i));
    return size == kUnknown ? name(i) : std::to_string(size);
  };
  const std::string names = List(argument.dims.rank, name);
  const std::string values = List(argument.dims.rank, known);
  return std::string("`") + argument.name + "` must have shape " + names +
         (values != names ? " = " + values : "") + ", got " + ToText(sizes, rank);
}

std::string Dimensions::Learn(const Argument& argument, const int64_t* sizes, int rank) {
  if (rank != argument.dims.rank) return Misfit(argument, sizes, rank);
  const auto unfit = [&](const std::string& expected) {
    return std::string("`") + argument.name + "` must have " + expected + ", got shape " +
           ToText(sizes, rank);
  };
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == kUnknown) continue;
    const Dim dim = InLayout(argument.dims, options_.layout, i);
    const int64_t expected = Size(dim);
    if (expected == kUnknown) {
      // Of the kernel none is even too, and is told from other sizes that are 0.
      const bool is_kernel = dim == Dim::kKernelHeight || dim == Dim::kKernelWidth;
      if (is_kernel && sizes[i] % 2 == 0) return unfit("an odd " + Name(dim));
      if (dim != Dim::kBatch && sizes[i] == 0) return unfit(Name(dim) + " >= 1");
      sizes_[static_cast<int>(dim)] = sizes[i];
    } else if (expected != sizes[i]) {
      return Misfit(argument, sizes, rank);
    }
  }
  return {};
}

Shape Dimensions::ShapeOf(const Argument& argument) const {
  Shape shape;
  shape.rank = argument.dims.rank;
  for (int i = 0; i < shape.rank; ++i)
    shape.sizes[i] = Size(InLayout(argument.dims, options_.layout, i));
  return shape;
}

Problem Dimensions::ToProblem() const {
  Problem problem = options_;
  problem.batch = Size(Dim::kBatch);
  problem.height = Size(Dim::kHeight);
  problem.width = Size(Dim::kWidth);
  problem.channels = Size(Dim::kChannels);
  // Ops without a gate lack its size; the defaults stand.
  if (Size(Dim::kHidden) != kUnknown) problem.hidden = Size(Dim::kHidden);
  if (Size(Dim::kKernelHeight) != kUnknown) problem.kernel_height = Size(Dim::kKernelHeight);
  if (Size(Dim::kKernelWidth) != kUnknown) problem.kernel_width = Size(Dim::kKernelWidth);
  return problem;
}

}  // namespace ops
}  // namespace cbam_ops
