// A hint to the system about large outputs, for the adapters that allocate them.
//
// A freshly allocated map is mapped page by page at the first write, and at 4 KiB a page that costs
// several times what writing it does. Linux backs memory with 2 MiB pages where a program asks for
// it (its usual setting, "madvise").
#ifndef CBAM_OPS_CORE_CPU_PAGES_H_
#define CBAM_OPS_CORE_CPU_PAGES_H_

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cbam_ops {
namespace cpu {

// Asks for large pages for the whole ones within [memory, memory + bytes). Changes no contents;
// where the system declines, nothing is lost.
inline void PreferLargePages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(memory) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kLargePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace cpu
}  // namespace cbam_ops

#endif  // CBAM_OPS_CORE_CPU_PAGES_H_
