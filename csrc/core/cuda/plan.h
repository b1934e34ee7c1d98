// How a problem is cut up: plain host code, shared by the launchers and the workspace queries.
// Nothing here depends on the device but the number of samples in flight, which no result depends
// on.
#ifndef CBAM_OPS_CORE_CUDA_PLAN_H_
#define CBAM_OPS_CORE_CUDA_PLAN_H_

#include <cstddef>
#include <cstdint>

#include "core/checked.h"
#include "core/contract.h"

namespace cbam_ops {
namespace cuda {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t AtMost(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t AtLeast(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t Positions(const Problem& problem) { return problem.height * problem.width; }
inline bool ChannelsLast(const Problem& problem) { return problem.layout == Layout::kNHWC; }

using Arena = WorkspaceArena<kCudaAlignment>;

// Column reductions over positions are cut into slices of at least 128 rows (16 per thread with 8
// threads to a column), so that the partial results are at most 1/64 of the map; at most 256
// slices.
inline int64_t RowsPerSplit(int64_t rows) { return AtLeast(128, CeilDiv(rows, 256)); }
inline int64_t ChannelSplits(const Problem& problem) {
  if (!ChannelsLast(problem)) return 1;  // along the rows: not cut
  return AtLeast(1, CeilDiv(Positions(problem), RowsPerSplit(Positions(problem))));
}

// Samples whose maps are in flight together, so that what one pass read the next finds in L2: a
// third of it (the rest is for what is written, and for the way addresses fall on its slices).
// `maps` of a sample are read by each pass.
inline int64_t SamplesInFlight(const Problem& problem, int64_t element_bytes, int maps,
                               int64_t l2_bytes) {
  const int64_t bytes = AtLeast(1, Positions(problem) * problem.channels * element_bytes * maps);
  const int64_t most = AtLeast(1, l2_bytes / 3 / bytes);
  if (most >= problem.batch) return AtLeast(1, problem.batch);
  return CeilDiv(problem.batch, CeilDiv(problem.batch, most));  // chunks of equal size
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_PLAN_H_
