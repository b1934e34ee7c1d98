#include "testing/ptx/memory.h"

#include <algorithm>
#include <utility>

namespace cbam_ops {
namespace ptx {
namespace {

constexpr int kTraced = 2;  // bytes per trace: bytes on their own are not traced

bool IsOrdered(const Moment& before, const Actor& actor) {
  if (before.warp == actor.now.warp)
    return before.round < actor.now.round || before.lane == actor.now.lane;
  for (const Knowledge* knowledge : {actor.warp, actor.lane}) {
    const auto known =
        std::lower_bound(knowledge->begin(), knowledge->end(), before.warp,
                         [](const Known& one, uint32_t warp) { return one.warp < warp; });
    if (known == knowledge->end() || known->warp != before.warp) continue;
    if (before.round < known->round) return true;
    if (before.round == known->round && before.lane == known->lane) return true;
  }
  return false;
}

}  // namespace

void Learn(Knowledge* known, const Knowledge& more) {
  if (more.empty()) return;
  if (known->empty()) {
    *known = more;
    return;
  }
  Knowledge both;
  both.reserve(known->size() + more.size());
  auto a = known->begin();
  auto b = more.begin();
  while (a != known->end() || b != more.end()) {
    const bool from_a = b == more.end() || (a != known->end() && a->warp <= b->warp);
    const bool from_b = a == known->end() || (b != more.end() && b->warp <= a->warp);
    // Of the same round, whoever knows a lane of it knows more.
    const bool knows_lane = from_a && from_b && b->round == a->round && a->lane == kManyLanes;
    const bool takes_b = !from_a || (from_b && (b->round > a->round || knows_lane));
    both.push_back(takes_b ? *b : *a);
    a += from_a;
    b += from_b;
  }
  *known = std::move(both);
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

const Moment* Buffer::Trace(const char* address, int64_t bytes, Access access, bool atomic,
                            uint32_t launch, const Actor& actor) {
  if (traces_.empty() || bytes < kTraced) return nullptr;
  const auto begin = static_cast<size_t>(address - data_) / kTraced;
  const size_t end = begin + static_cast<size_t>(bytes) / kTraced;
  for (size_t i = begin; i < end; ++i) {
    ptx::Trace& trace = traces_[i];
    const bool both_atomic = atomic && trace.atomic_write;
    if (trace.write_launch == launch && !both_atomic && !IsOrdered(trace.write, actor))
      return &trace.write;
    if (access == Access::kWrite) {
      for (int reader = 0; reader < 2; ++reader) {
        if (trace.read_launch[reader] == launch && !(atomic && trace.atomic_reads) &&
            !IsOrdered(trace.reads[reader], actor))
          return &trace.reads[reader];
      }
      trace.write = actor.now;
      trace.write_launch = launch;
      trace.atomic_write = atomic;
      trace.read_launch[0] = trace.read_launch[1] = 0;
      continue;
    }
    const bool is_first = trace.read_launch[0] != launch;
    const int which = is_first || trace.reads[0].warp == actor.now.warp ? 0 : 1;
    Moment& read = trace.reads[which];
    const bool again = trace.read_launch[which] == launch && read.warp == actor.now.warp &&
                       read.round == actor.now.round;
    trace.atomic_reads = atomic && (is_first || trace.atomic_reads);
    trace.read_launch[which] = launch;
    if (!again) {
      read = actor.now;
    } else if (read.lane != actor.now.lane) {
      read.lane = kManyLanes;
    }
  }
  return nullptr;
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
