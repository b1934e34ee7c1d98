// The memory that a launch may touch, what is known of every byte of it, and caches that count.
#ifndef CBAM_OPS_TESTING_PTX_MEMORY_H_
#define CBAM_OPS_TESTING_PTX_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace cbam_ops {
namespace ptx {

constexpr int kSectorBytes = 32;

// Who accesses memory, and when. Rounds are a warp's: one ends at each of its barriers.
struct Moment {
  uint32_t warp = 0;  // of the grid
  uint32_t round = 0;
  uint16_t lane = 0;
};
constexpr uint16_t kManyLanes = 32;

// What is known to be done: of each warp all rounds before `round`, and what `lane` did in it. In
// the order of the warps.
struct Known {
  uint32_t warp;
  uint32_t round;
  uint16_t lane;
};
using Knowledge = std::vector<Known>;
void Learn(Knowledge* known, const Knowledge& more);

struct Actor {
  Moment now;
  const Knowledge* warp;  // what the warp knows since its last barrier
  const Knowledge* lane;  // what the lane has learnt since
};

// The last accesses to two bytes; of the reads those by two warps.
struct Trace {
  Moment write, reads[2];
  uint32_t write_launch = 0, read_launch[2] = {};
  bool atomic_write = false, atomic_reads = false;
};

enum class Access { kRead, kWrite };

// A piece of memory: an argument of a launch, or a block's shared memory.
class Buffer {
 public:
  Buffer(std::string name, char* data, int64_t bytes, bool written, bool writable, bool traced);

  const std::string& name() const { return name_; }
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool writable() const { return writable_; }
  bool Holds(const char* address, int64_t bytes) const {
    return address >= data_ && address + bytes <= data_ + bytes_;
  }
  bool IsWritten(const char* address, int64_t bytes) const;
  void MarkWritten(const char* address, int64_t bytes);
  // Whether something in this launch wrote there.
  bool WrittenIn(uint32_t launch, const char* address) const;
  // Records an access. Another's that no order keeps apart from it, or null.
  const Moment* Trace(const char* address, int64_t bytes, Access access, bool atomic,
                      uint32_t launch, const Actor& actor);

 private:
  std::string name_;
  char* data_;
  int64_t bytes_;
  bool writable_;
  std::vector<bool> written_;  // empty: all of it
  std::vector<ptx::Trace> traces_;
};

// Sectors of a cache, the last used ones.
class Cache {
 public:
  explicit Cache(int64_t bytes) : capacity_(bytes / kSectorBytes) {}
  // Whether the sector was there; if a written one had to leave, `*written_back` is counted up.
  bool Touch(uint64_t sector, bool write, int64_t* written_back);
  void Clear();
  int64_t WrittenSectors() const;

 private:
  struct Node {
    uint64_t sector;
    int before, after;
    bool written;
  };
  void Unlink(int node);
  void PutFirst(int node);

  int64_t capacity_;
  std::unordered_map<uint64_t, int> where_;
  std::vector<Node> nodes_;
  int first_ = -1, last_ = -1;
};

}  // namespace ptx
}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_PTX_MEMORY_H_
