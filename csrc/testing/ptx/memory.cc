#include "testing/ptx/memory.h"

#include <algorithm>
#include <utility>

namespace cbam_ops {
namespace ptx {
namespace {

constexpr int kTraced = 2;  // bytes per trace: bytes on their own are not traced

bool IsOrdered(const Moment& before, const Actor& actor) {
  const Moment& now = actor.now;
  if (before.block == now.block) {
    if (before.round < now.round || before.thread == now.thread) return true;
    const int warp = now.thread / 32;
    const bool same_warp = before.thread == (kManyOfWarp | warp) || before.thread / 32 == warp;
    return same_warp && before.warp_round < now.warp_round;
  }
  for (const Knowledge* knowledge : {actor.block, actor.thread}) {
    if (before.block >= knowledge->size()) continue;
    const Known& known = (*knowledge)[before.block];
    if (before.round < known.round) return true;
    if (before.round == known.round && before.thread == known.thread) return true;
  }
  return false;
}

std::string Describe(const char* what, const Moment& moment) {
  const std::string thread =
      moment.thread == kManyOfBlock ? "several threads"
      : moment.thread >= kManyOfWarp
          ? "several threads of warp " + std::to_string(moment.thread & ~kManyOfWarp)
          : "thread " + std::to_string(moment.thread);
  return std::string(what) + " by " + thread + " of block " + std::to_string(moment.block);
}

}  // namespace

void Learn(Knowledge* known, const Knowledge& more) {
  if (known->size() < more.size()) known->resize(more.size());
  for (size_t i = 0; i < more.size(); ++i) {
    if (more[i].round > (*known)[i].round ||
        (more[i].round == (*known)[i].round && more[i].thread != kManyOfBlock))
      (*known)[i] = more[i];
  }
}

Buffer::Buffer(std::string name, char* data, int64_t bytes, bool written, bool writable,
               bool traced)
    : name_(std::move(name)),
      data_(data),
      bytes_(bytes),
      writable_(writable),
      written_(written ? 0 : static_cast<size_t>(bytes)),
      traces_(traced ? static_cast<size_t>((bytes + kTraced - 1) / kTraced) : 0) {}

bool Buffer::IsWritten(const char* address, int64_t bytes) const {
  if (written_.empty()) return true;
  const auto begin = written_.begin() + (address - data_);
  return std::find(begin, begin + bytes, false) == begin + bytes;
}
void Buffer::MarkWritten(const char* address, int64_t bytes) {
  if (written_.empty()) return;
  const auto begin = written_.begin() + (address - data_);
  std::fill(begin, begin + bytes, true);
}
bool Buffer::WrittenIn(uint32_t launch, const char* address) const {
  return !traces_.empty() &&
         traces_[static_cast<size_t>(address - data_) / kTraced].write_launch == launch;
}

std::string Buffer::Trace(const char* address, int64_t bytes, Access access, bool atomic,
                          uint32_t launch, const Actor& actor) {
  if (traces_.empty() || bytes < kTraced) return "";
  const auto begin = static_cast<size_t>(address - data_) / kTraced;
  const size_t end = begin + static_cast<size_t>(bytes) / kTraced;
  for (size_t i = begin; i < end; ++i) {
    ptx::Trace& trace = traces_[i];
    const bool both_atomic = atomic && trace.atomic_write;
    if (trace.write_launch == launch && !both_atomic && !IsOrdered(trace.write, actor))
      return Describe("what was written", trace.write);
    if (access == Access::kWrite) {
      for (int reader = 0; reader < 2; ++reader) {
        if (trace.read_launch[reader] == launch && !(atomic && trace.atomic_reads) &&
            !IsOrdered(trace.reads[reader], actor))
          return Describe("what was read", trace.reads[reader]);
      }
      trace.write = actor.now;
      trace.write_launch = launch;
      trace.atomic_write = atomic;
      trace.read_launch[0] = trace.read_launch[1] = 0;
      continue;
    }
    // Two readers are remembered, of different blocks if there are several.
    int which = 0;
    if (trace.read_launch[0] == launch && trace.reads[0].block != actor.now.block) which = 1;
    Moment& read = trace.reads[which];
    const bool again = trace.read_launch[which] == launch && read.block == actor.now.block &&
                       read.round == actor.now.round;
    trace.atomic_reads = atomic && (trace.read_launch[0] != launch || trace.atomic_reads);
    if (!again) {
      read = actor.now;
    } else if (read.thread != actor.now.thread) {
      const int warp = actor.now.thread / 32;
      const bool same_warp = read.thread == (kManyOfWarp | warp) || read.thread / 32 == warp;
      read.thread = same_warp ? static_cast<uint16_t>(kManyOfWarp | warp) : kManyOfBlock;
      read.warp_round = actor.now.warp_round;
    }
    trace.read_launch[which] = launch;
  }
  return "";
}

bool Cache::Touch(uint64_t sector, bool write, int64_t* written_back) {
  const auto found = where_.find(sector);
  if (found != where_.end()) {
    const int node = found->second;
    nodes_[node].written |= write;
    if (node != first_) {
      Unlink(node);
      PutFirst(node);
    }
    return true;
  }
  if (capacity_ == 0) {
    *written_back += write;
    return false;
  }
  int node = static_cast<int>(nodes_.size());
  if (node == capacity_) {
    node = last_;
    *written_back += nodes_[node].written;
    where_.erase(nodes_[node].sector);
    Unlink(node);
  } else {
    nodes_.emplace_back();
  }
  nodes_[node] = {sector, -1, -1, write};
  where_[sector] = node;
  PutFirst(node);
  return false;
}
void Cache::Clear() {
  where_.clear();
  nodes_.clear();
  first_ = last_ = -1;
}
int64_t Cache::WrittenSectors() const {
  return std::count_if(nodes_.begin(), nodes_.end(), [](const Node& node) { return node.written; });
}
void Cache::Unlink(int node) {
  const Node& its = nodes_[node];
  (its.before < 0 ? first_ : nodes_[its.before].after) = its.after;
  (its.after < 0 ? last_ : nodes_[its.after].before) = its.before;
}
void Cache::PutFirst(int node) {
  nodes_[node].before = -1;
  nodes_[node].after = first_;
  if (first_ >= 0) nodes_[first_].before = node;
  first_ = node;
  if (last_ < 0) last_ = node;
}

}  // namespace ptx
}  // namespace cbam_ops
