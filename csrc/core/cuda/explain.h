// Whether a build can run on a device, from what is known without using the device, in words.
#ifndef CBAM_OPS_CORE_CUDA_EXPLAIN_H_
#define CBAM_OPS_CORE_CUDA_EXPLAIN_H_

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cbam_ops {
namespace cuda {

// Whether code for one entry of CMAKE_CUDA_ARCHITECTURES ("80", "80-real", "80-virtual",
// "90a-real", "100f-real") runs on a device of `capability`. Words that are no architectures
// ("native") may.
inline bool ArchitectureRuns(const char* entry, size_t length, int capability) {
  char* end = nullptr;
  const int built = static_cast<int>(std::strtol(entry, &end, 10));
  if (end == entry) return true;
  const auto rest = static_cast<size_t>(end - entry);
  if (rest < length && *end == 'a') return capability == built;
  const bool same_generation = capability / 10 == built / 10;
  if (rest < length && *end == 'f') return same_generation && capability >= built;
  // Machine code runs on later devices of its generation, PTX on all later ones.
  const bool only_real = length - rest == 5 && std::strncmp(end, "-real", 5) == 0;
  return capability >= built && (same_generation || !only_real);
}

// Of a list of architectures separated by spaces, whether one runs; an empty list says nothing, and
// is taken for a yes.
inline bool AnyArchitectureRuns(const char* architectures, int capability) {
  if (*architectures == '\0') return true;
  for (const char* entry = architectures; *entry != '\0';) {
    const size_t length = std::strcspn(entry, " ");
    if (length > 0 && ArchitectureRuns(entry, length, capability)) return true;
    entry += length + (entry[length] == ' ' ? 1 : 0);
  }
  return false;
}

// Why a build cannot run, as one sentence; empty where it can. Versions are 1000 * major + 10 *
// minor, capabilities 10 * major + minor, 0 for what is not there.
inline void ExplainMachine(int driver_version, int build_version, int capability,
                           const char* architectures, char* text, size_t size) {
  text[0] = '\0';
  if (driver_version == 0) {
    std::snprintf(text, size, "There is no NVIDIA driver.");
  } else if (driver_version / 1000 < build_version / 1000) {
    // Within a major release any driver runs what any toolkit built.
    std::snprintf(text, size,
                  "The NVIDIA driver is made for CUDA %d.%d, and the kernels were built with CUDA "
                  "%d.%d: they need a driver for CUDA %d.",
                  driver_version / 1000, driver_version % 1000 / 10, build_version / 1000,
                  build_version % 1000 / 10, build_version / 1000);
  } else if (capability == 0) {
    std::snprintf(text, size, "The NVIDIA driver finds no GPU.");
  } else if (!AnyArchitectureRuns(architectures, capability)) {
    std::snprintf(text, size,
                  "The GPU has compute capability %d.%d, and the kernels were built for the "
                  "architectures %s.",
                  capability / 10, capability % 10, architectures);
  }
}

}  // namespace cuda
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CUDA_EXPLAIN_H_
