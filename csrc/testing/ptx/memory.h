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

// Who accesses memory, and when: rounds are counted by the barriers that the thread has passed, of
// its block and of its warp. What a thread does in one round another sees in the next.
struct Moment {
  uint32_t block = 0;
  uint16_t thread = 0;
  uint16_t warp_round = 0;
  uint32_t round = 0;
};
// For a moment's thread: all of a warp, or of a block.
constexpr uint16_t kManyOfWarp = 0x8000;
constexpr uint16_t kManyOfBlock = 0xffff;

// What of other blocks' work is known to be done: of each block all rounds before `round`, and what
// `thread` did in it. Empty: nothing.
struct Known {
  uint32_t round = 0;
  uint16_t thread = kManyOfBlock;
};
using Knowledge = std::vector<Known>;
void Learn(Knowledge* known, const Knowledge& more);

struct Actor {
  Moment now;
  const Knowledge* block;   // what the block knows since its last barrier
  const Knowledge* thread;  // what the thread has learnt since
};

// The last accesses to two bytes.
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
  // Records an access; whose unordered access it meets, in words, or "".
  std::string Trace(const char* address, int64_t bytes, Access access, bool atomic, uint32_t launch,
                    const Actor& actor);

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
