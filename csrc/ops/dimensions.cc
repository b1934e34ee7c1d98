#include "ops/dimensions.h"

#include <algorithm>
#include <string>

namespace cbam_ops {
namespace ops {
std::string Name(Dim dim) {
  static constexpr const char* kNames[] = {"N",  "D",  "H",  "W",          "C", "hidden",
                                           "kd", "kh", "kw", "statistics", "1", "2"};
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

bool IsOfVolumes(Dim dim) { return dim == Dim::kDepth || dim == Dim::kKernelDepth; }
bool DependsOnRank(const Argument& argument) {
  const Dim* const dims = argument.dims.dims;
  return std::any_of(dims, dims + argument.dims.rank, IsOfVolumes);
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

Dims Dimensions::DimsOf(const Argument& argument, bool is_volume) const {
  Dims dims = argument.dims;
  Dim* const end = dims.dims + dims.rank;
  if (dims.is_map && options_.layout == Layout::kNCHW) std::rotate(dims.dims + 1, end - 1, end);
  if (!is_volume)
    dims.rank = static_cast<int>(std::remove_if(dims.dims, end, IsOfVolumes) - dims.dims);
  return dims;
}

std::string Dimensions::Misfit(const Argument& argument, const int64_t* sizes, int rank) const {
  const Dims dims = DimsOf(argument, is_volume_);
  const auto name = [&](int i) { return Name(dims.dims[i]); };
  const auto known = [&](int i) {
    const int64_t size = Size(dims.dims[i]);
    return size == kUnknown ? name(i) : std::to_string(size);
  };
  const std::string names = List(dims.rank, name);
  const std::string values = List(dims.rank, known);
  std::string volumes;
  if (!rank_is_known_ && DependsOnRank(argument)) {
    const Dims more = DimsOf(argument, true);
    volumes = " or " + List(more.rank, [&](int i) { return Name(more.dims[i]); });
  }
  return std::string("`") + argument.name + "` must have shape " + names +
         (values != names ? " = " + values : "") + volumes + ", got " + ToText(sizes, rank);
}

std::string Dimensions::Learn(const Argument& argument, const int64_t* sizes, int rank) {
  if (!rank_is_known_ && DependsOnRank(argument)) {
    is_volume_ = rank == argument.dims.rank;
    rank_is_known_ = is_volume_ || rank + 1 == argument.dims.rank;
  }
  const Dims dims = DimsOf(argument, is_volume_);
  if (rank != dims.rank) return Misfit(argument, sizes, rank);
  const auto unfit = [&](const std::string& expected) {
    return std::string("`") + argument.name + "` must have " + expected + ", got shape " +
           ToText(sizes, rank);
  };
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == kUnknown) continue;
    const Dim dim = dims.dims[i];
    const int64_t expected = Size(dim);
    if (expected == kUnknown) {
      // Of the kernel none is even too, and is told from other sizes that are 0.
      const bool is_kernel =
          dim == Dim::kKernelDepth || dim == Dim::kKernelHeight || dim == Dim::kKernelWidth;
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
  const Dims dims = DimsOf(argument, is_volume_);
  Shape shape;
  shape.rank = dims.rank;
  for (int i = 0; i < shape.rank; ++i) shape.sizes[i] = Size(dims.dims[i]);
  return shape;
}

Problem Dimensions::ToProblem() const {
  Problem problem = options_;
  problem.batch = Size(Dim::kBatch);
  if (is_volume_) problem.depth = Size(Dim::kDepth);
  problem.height = Size(Dim::kHeight);
  problem.width = Size(Dim::kWidth);
  problem.channels = Size(Dim::kChannels);
  // Ops without a gate lack its size, images a kernel's depth; the defaults stand.
  if (Size(Dim::kHidden) != kUnknown) problem.hidden = Size(Dim::kHidden);
  if (Size(Dim::kKernelDepth) != kUnknown) problem.kernel_depth = Size(Dim::kKernelDepth);
  if (Size(Dim::kKernelHeight) != kUnknown) problem.kernel_height = Size(Dim::kKernelHeight);
  if (Size(Dim::kKernelWidth) != kUnknown) problem.kernel_width = Size(Dim::kKernelWidth);
  return problem;
}

}  // namespace ops
}  // namespace cbam_ops
