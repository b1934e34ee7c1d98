#include "testing/ptx/machine.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <utility>

namespace cbam_ops {
namespace ptx {
namespace {

// A warp that polls in vain so often, while all others do the same, waits forever.
constexpr int kVainPolls = 64;
constexpr int64_t kMostSteps = 2'000'000'000;

struct Branching {  // lanes that stand at one instruction, until they come to where others wait
  int pc, meet;
  uint32_t mask;
};

struct Learnt {
  Knowledge acquired;   // holds for this thread since
  Knowledge loaded;     // would, after a fence
  Knowledge published;  // what its next relaxed store releases, after a fence
};

struct Block;
struct Warp {
  Block* block;
  int index;
  uint32_t live;
  std::vector<Branching> stack;
  size_t put_off = 0;  // how many of the stack's last entries wait for lanes of the others
  char* registers = nullptr;
  std::unique_ptr<char[]> storage;
  std::vector<char> local_data;  // of each lane in turn
  std::unique_ptr<Buffer> local;
  int barrier = -1;  // where it waits
  uint32_t round = 0;
  std::shared_ptr<const Knowledge> known = std::make_shared<Knowledge>();
  std::unordered_map<int, Learnt> learnt;  // by lane, since the last barrier
  // Polling: what was found where, and the state of all memory then.
  std::unordered_map<int, uint64_t> polls;
  bool polling = false;
  int vain_polls = 0;
  int64_t poll_progress = -1;
};

struct Block {
  uint32_t index = 0;
  int slot = 0;  // among those that run
  std::vector<char> shared_data;
  std::unique_ptr<Buffer> shared;
  std::deque<Warp> warps;
  int live_warps = 0;
  struct Barrier {
    int waiting = 0, threads = 0;  // threads 0: all of the block
  };
  std::map<int, Barrier> barriers;
};

std::string Demangle(const std::string& name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

template <typename F>
void EachActive(uint32_t mask, const F& body) {
  for (; mask != 0; mask &= mask - 1) body(__builtin_ctz(mask));
}

uint64_t LoadLane(const char* lanes, int bytes, int lane) {
  uint64_t value = 0;
  std::memcpy(&value, lanes + bytes * lane, static_cast<size_t>(bytes));
  return value;
}
void StoreLane(char* lanes, int bytes, int lane, uint64_t value) {
  std::memcpy(lanes + bytes * lane, &value, static_cast<size_t>(bytes));
}
uint64_t Extend(uint64_t value, int bytes, bool sign) {
  const int unused = 64 - 8 * bytes;
  if (sign) return static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
  return value << unused >> unused;
}

}  // namespace

// One launch.
class Grid {
 public:
  Grid(Machine* machine, Kernel* kernel, Dimensions grid, Dimensions block, int64_t shared_bytes,
       std::vector<char> parameters)
      : machine_(*machine),
        kernel_(*kernel),
        grid_(grid),
        block_(block),
        threads_(static_cast<int>(block[0] * block[1] * block[2])),
        shared_bytes_(shared_bytes),
        parameters_(std::move(parameters)),
        random_(machine->configuration.seed),
        seeded_(machine->configuration.seed != 0),
        l1_(static_cast<size_t>(machine->configuration.multiprocessors),
            Cache(machine->configuration.l1_bytes)) {}

  void Run() {
    const Configuration& configuration = machine_.configuration;
    const size_t resident = static_cast<size_t>(configuration.multiprocessors *
                                                configuration.blocks_per_multiprocessor);
    const uint32_t blocks = grid_[0] * grid_[1] * grid_[2];
    std::vector<uint32_t> order(blocks);
    for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
    if (seeded_) std::shuffle(order.begin(), order.end(), random_);
    size_t started = 0;
    for (;;) {
      while (running_.size() < resident && started < order.size()) Start(order[started++]);
      if (running_.empty()) return;
      Warp* const warp = Choose();
      const int64_t steps = seeded_ ? 1 + static_cast<int64_t>(random_() % 100) : INT64_MAX;
      RunWarp(warp, steps);
      Block* const block = warp->block;
      if (block->live_warps == 0) {
        free_slots_.push_back(block->slot);
        running_.erase(std::find_if(running_.begin(), running_.end(),
                                    [=](const auto& one) { return one.get() == block; }));
      }
    }
  }

 private:
  // ---- the schedule -----------------------------------------------------------------------------

  void Start(uint32_t index) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->slot = static_cast<int>(running_.size());
    if (!free_slots_.empty()) {
      block->slot = free_slots_.back();
      free_slots_.pop_back();
    }
    block->shared_data.assign(static_cast<size_t>(shared_bytes_), '\xff');
    block->shared =
        std::make_unique<Buffer>("shared memory", block->shared_data.data(), shared_bytes_, false,
                                 true, machine_.configuration.races);
    block->live_warps = (threads_ + kLanes - 1) / kLanes;
    for (int w = 0; w < block->live_warps; ++w) {
      Warp& warp = block->warps.emplace_back();
      warp.block = block.get();
      warp.index = w;
      const int lanes = std::min(kLanes, threads_ - w * kLanes);
      warp.live = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
      warp.stack.push_back({0, -1, warp.live});
      const auto bytes = static_cast<size_t>(kernel_.register_bytes);
      warp.storage = std::make_unique<char[]>(bytes + 64);
      const auto start = reinterpret_cast<uintptr_t>(warp.storage.get());
      warp.registers = warp.storage.get() + (64 - start % 64);
      const int64_t local_bytes = kernel_.function.local_bytes * kLanes;
      warp.local_data.resize(static_cast<size_t>(local_bytes));
      // Not whether it was written: compilers load early what they may not come to use.
      warp.local = std::make_unique<Buffer>("local memory", warp.local_data.data(), local_bytes,
                                            true, true, false);
      for (const Kernel::Preset& preset : kernel_.presets) SetRegister(warp, preset);
    }
    running_.push_back(std::move(block));
  }

  void SetRegister(const Warp& warp, const Kernel::Preset& preset) {
    char* const at = warp.registers + preset.at;
    if (preset.bytes == 0) {
      const auto mask = static_cast<uint32_t>(preset.value);
      std::memcpy(at, &mask, sizeof(mask));
      return;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto thread = static_cast<uint32_t>(warp.index * kLanes + lane);
      const uint64_t value = preset.special.empty()
                                 ? preset.value
                                 : Special(preset.special, warp.block->index, thread);
      StoreLane(at, preset.bytes, lane, value);
    }
  }

  uint64_t Special(const std::string& name, uint32_t block, uint32_t thread) const {
    const auto of = [&](const Dimensions& sizes, uint32_t index) -> uint64_t {
      if (name.back() == 'x') return index % sizes[0];
      if (name.back() == 'y') return index / sizes[0] % sizes[1];
      return index / sizes[0] / sizes[1];
    };
    const auto size_of = [&](const Dimensions& sizes) -> uint64_t {
      return sizes[static_cast<size_t>(name.back() - 'x')];
    };
    const std::string base = name.substr(0, name.find('.'));
    if (base == "%tid") return of(block_, thread);
    if (base == "%ctaid") return of(grid_, block);
    if (base == "%ntid") return size_of(block_);
    if (base == "%nctaid") return size_of(grid_);
    if (name == "%laneid") return thread % kLanes;
    if (name == "%warpid") return thread / kLanes;
    throw Error(kernel_.name + ": unknown PTX: " + name);
  }

  bool CanRun(const Warp& warp) const {
    return warp.live != 0 && warp.barrier < 0 && !(warp.polling && warp.poll_progress == progress_);
  }

  Warp* Choose() {
    for (int tries = 0; seeded_ && tries < 16; ++tries) {  // most can go on, mostly
      std::deque<Warp>& warps = running_[random_() % running_.size()]->warps;
      Warp& warp = warps[random_() % warps.size()];
      if (CanRun(warp)) return &warp;
    }
    std::vector<Warp*> ready, polling;
    for (const auto& block : running_) {
      for (Warp& warp : block->warps) {
        if (CanRun(warp)) {
          if (!seeded_) return &warp;
          ready.push_back(&warp);
        } else if (warp.live != 0 && warp.barrier < 0 && warp.vain_polls < kVainPolls) {
          polling.push_back(&warp);
        }
      }
    }
    if (ready.empty()) ready.swap(polling);
    if (!ready.empty()) return ready[seeded_ ? random_() % ready.size() : 0];
    std::string waiting;
    for (const auto& block : running_) {
      for (Warp& warp : block->warps) {
        if (warp.live == 0) continue;
        // It stands behind what it waits at.
        const Step& step = kernel_.steps[static_cast<size_t>(warp.stack.back().pc - 1)];
        waiting += "\n  " + Where(warp, __builtin_ctz(warp.stack.back().mask), step) +
                   (warp.barrier >= 0 ? ": waits at a barrier" : ": polls");
      }
    }
    throw Error("deadlock: all threads wait" + waiting);
  }

  // ---- one warp ---------------------------------------------------------------------------------

  void RunWarp(Warp* warp, int64_t steps) {
    warp->polling = false;
    while (steps-- > 0) {
      if (++steps_ > kMostSteps) throw Error(kernel_.name + ": runs on and on");
      Branching& top = warp->stack.back();
      if (top.pc == top.meet) {
        warp->stack.pop_back();
        continue;
      }
      Step& step = kernel_.steps[static_cast<size_t>(top.pc)];
      uint32_t mask = top.mask;
      if (step.guard >= 0) {
        uint32_t guard;
        std::memcpy(&guard, warp->registers + step.guard, sizeof(guard));
        mask &= step.guard_negated ? ~guard : guard;
      }
      ++step.tally.issued;
      if (step.kind == Kind::kLanes) {
        char* const registers = warp->registers;
        step.function({registers + step.d, registers + step.a, registers + step.b,
                       registers + step.c, registers + step.e, mask, step.mode});
        ++top.pc;
        continue;
      }
      if (!RunSpecial(warp, &step, mask)) return;
    }
  }

  // Whether the warp goes on.
  bool RunSpecial(Warp* warp, Step* step, uint32_t mask) {
    switch (step->kind) {
      case Kind::kBranch:
        Branch(warp, *step, mask);
        return true;
      case Kind::kExit:
        Exit(warp, mask);
        return warp->live != 0;
      case Kind::kTrap:
        if (mask != 0) Fault(*warp, mask, *step, "a trap");
        break;
      case Kind::kBarrier:
        return Meet(warp, *step, mask);
      case Kind::kWarpBarrier:
      case Kind::kShuffle:
        if (!AllThere(warp, *step, mask)) return true;
        Exchange(warp, *step, mask);
        break;
      default:
        break;
    }
    ++warp->stack.back().pc;
    if (mask == 0) return true;
    switch (step->kind) {
      case Kind::kPack:
      case Kind::kUnpack:
        Repack(*warp, *step, mask);
        break;
      case Kind::kLoad:
      case Kind::kStore:
      case Kind::kAtomic:
        return AccessMemory(warp, step, mask);
      case Kind::kFence:
        if (step->beyond) {
          EachActive(mask, [&](int lane) {
            Learnt& learnt = LearntBy(*warp, lane);
            Learn(&learnt.acquired, learnt.loaded);
            learnt.published = KnownTo(*warp, lane);
          });
        }
        break;
      default:
        break;
    }
    return true;
  }

  static void Branch(Warp* warp, const Step& step, uint32_t taken) {
    Branching& top = warp->stack.back();
    const uint32_t passed = top.mask & ~taken;
    const int next = top.pc + 1;
    if (passed == 0 || taken == 0) {
      top.pc = passed == 0 ? step.target : next;
      return;
    }
    const int meet = step.meet;
    if (meet == top.meet) {
      warp->stack.pop_back();
    } else {
      top.pc = meet;
    }
    if (next != meet) warp->stack.push_back({next, meet, passed});
    if (step.target != meet) warp->stack.push_back({step.target, meet, taken});
    warp->put_off = 0;
  }

  void Exit(Warp* warp, uint32_t mask) {
    warp->live &= ~mask;
    ++warp->stack.back().pc;
    for (Branching& branching : warp->stack) branching.mask &= ~mask;
    warp->stack.erase(std::remove_if(warp->stack.begin(), warp->stack.end(),
                                     [](const Branching& b) { return b.mask == 0; }),
                      warp->stack.end());
    warp->put_off = 0;
    if (warp->live != 0) return;
    --warp->block->live_warps;
    ++progress_;
    CompleteBarriers(warp->block);
  }

  // Lanes that wait for others of their warp let those run first, which may be about to exit.
  // Whether there are others that have not waited yet.
  static bool PutOff(Warp* warp) {
    std::vector<Branching>& stack = warp->stack;
    size_t siblings = 1;
    while (siblings < stack.size() && stack[stack.size() - 1 - siblings].meet == stack.back().meet)
      ++siblings;
    if (++warp->put_off >= siblings) return false;
    std::rotate(stack.end() - static_cast<std::ptrdiff_t>(siblings), stack.end() - 1, stack.end());
    return true;
  }

  bool Meet(Warp* warp, const Step& step, uint32_t mask) {
    if (mask != warp->live) {
      if (PutOff(warp)) return true;
      Fault(*warp, mask, step, "a barrier that other threads of the warp do not come to");
    }
    warp->put_off = 0;
    Block* const block = warp->block;
    Block::Barrier& barrier = block->barriers[step.mode];
    if (barrier.waiting > 0 && barrier.threads != step.target)
      Fault(*warp, mask, step, "a barrier for other threads than those that wait at it");
    barrier.threads = step.target;
    ++barrier.waiting;
    warp->barrier = step.mode;
    ++warp->stack.back().pc;
    CompleteBarriers(block);
    return false;
  }
  void CompleteBarriers(Block* block) {
    for (auto& [number, barrier] : block->barriers) {
      const int expected = barrier.threads > 0 ? barrier.threads / kLanes : block->live_warps;
      if (barrier.waiting == 0 || barrier.waiting < expected) continue;
      barrier.waiting = 0;
      ++progress_;
      auto known = std::make_shared<Knowledge>();
      for (Warp& warp : block->warps) {
        if (warp.barrier != number) continue;
        Learn(known.get(), *warp.known);
        for (const auto& [lane, learnt] : warp.learnt) Learn(known.get(), learnt.acquired);
        Learn(known.get(), {{GridWarp(warp), ++warp.round, kManyLanes}});
      }
      for (Warp& warp : block->warps) {
        if (warp.barrier != number) continue;
        warp.barrier = -1;
        warp.known = known;
        warp.learnt.clear();
      }
    }
  }

  // ---- between lanes ----------------------------------------------------------------------------

  // Whether all lanes that an instruction names have come to it.
  bool AllThere(Warp* warp, const Step& step, uint32_t mask) {
    bool missing = false;
    EachActive(mask, [&](int lane) {
      const auto named = static_cast<uint32_t>(LoadLane(warp->registers + step.a, 4, lane));
      if ((named >> lane & 1) == 0)
        Fault(*warp, 1u << lane, step, "the thread's own lane is not in the mask");
      missing |= (named & warp->live & ~mask) != 0;
    });
    if (missing && PutOff(warp)) return false;
    if (missing) Fault(*warp, mask, step, "a lane of the mask does not take part");
    warp->put_off = 0;
    return true;
  }

  void Exchange(Warp* warp, const Step& step, uint32_t mask) {
    char* const registers = warp->registers;
    if (step.kind == Kind::kWarpBarrier) {
      ++warp->round;
      auto known = std::make_shared<Knowledge>(*warp->known);
      for (const auto& [lane, learnt] : warp->learnt) Learn(known.get(), learnt.acquired);
      warp->known = known;
      warp->learnt.clear();
      return;
    }
    uint32_t valid = 0;
    uint64_t results[kLanes];
    EachActive(mask, [&](int lane) {
      const auto by = static_cast<int>(LoadLane(registers + step.values[1], 4, lane) & 31);
      const auto control = static_cast<int>(LoadLane(registers + step.values[2], 4, lane));
      const int segment = control >> 8 & 31;
      const int last = (lane & segment) | (control & 31 & ~segment), first = lane & segment;
      int from = lane;
      bool inside = false;
      if (step.word == "up") {
        from = lane - by;
        inside = from >= last;
      } else {
        from = step.word == "down"   ? lane + by
               : step.word == "bfly" ? lane ^ by
                                     : first | (by & ~segment);
        inside = from <= last;
      }
      if (!inside) from = lane;
      if ((mask >> from & 1) == 0)
        Fault(*warp, 1u << lane, step,
              "reads lane " + std::to_string(from) + ", which does not take part");
      valid |= static_cast<uint32_t>(inside) << lane;
      results[lane] = LoadLane(registers + step.values[0], 4, from);
    });
    EachActive(mask, [&](int lane) { StoreLane(registers + step.d, 4, lane, results[lane]); });
    if (step.target >= 0) SetPredicate(registers + step.target, mask, valid);
  }
  static void SetPredicate(char* predicate, uint32_t mask, uint32_t value) {
    uint32_t old;
    std::memcpy(&old, predicate, sizeof(old));
    old = (old & ~mask) | (value & mask);
    std::memcpy(predicate, &old, sizeof(old));
  }
  static void Repack(const Warp& warp, const Step& step, uint32_t mask) {
    const int part_lane = step.bytes <= 4 ? 4 : 8;
    EachActive(mask, [&](int lane) {
      uint64_t whole = 0;
      if (step.kind == Kind::kUnpack)
        whole = LoadLane(warp.registers + step.a, step.lane_bytes, lane);
      for (size_t i = 0; i < step.values.size(); ++i) {
        if (step.values[i] < 0) continue;
        char* const part = warp.registers + step.values[i];
        const int shift = static_cast<int>(i) * 8 * step.bytes;
        if (step.kind == Kind::kUnpack) {
          StoreLane(part, part_lane, lane, Extend(whole >> shift, step.bytes, false));
        } else {
          whole |= Extend(LoadLane(part, part_lane, lane), step.bytes, false) << shift;
        }
      }
      if (step.kind == Kind::kPack)
        StoreLane(warp.registers + step.d, step.lane_bytes, lane, whole);
    });
  }

  // ---- memory -----------------------------------------------------------------------------------

  struct Place {
    Buffer* buffer;
    char* address;
  };

  uint64_t AddressOf(const Warp& warp, const Step& step, int lane) const {
    const uint64_t base = step.a < 0 ? 0 : LoadLane(warp.registers + step.a, step.base_bytes, lane);
    return base + static_cast<uint64_t>(step.offset);
  }

  Place Locate(const Warp& warp, const Step& step, int lane, uint64_t address) {
    const int64_t bytes =
        step.bytes * static_cast<int64_t>(step.kind == Kind::kAtomic ? 1 : step.values.size());
    const auto fault = [&](const std::string& what) { Fault(warp, 1u << lane, step, what); };
    if (address % static_cast<uint64_t>(bytes) != 0)
      fault("a misaligned access of " + std::to_string(bytes) + " bytes");
    Place place = {};
    if (step.space == Space::kLocal) {
      const int64_t local_bytes = kernel_.function.local_bytes;
      if (address + static_cast<uint64_t>(bytes) > static_cast<uint64_t>(local_bytes))
        fault("outside of local memory");
      place.buffer = warp.local.get();
      place.address = place.buffer->data() + lane * local_bytes + address;
    } else if (step.space == Space::kShared || address - kSharedWindow < kWindowBytes) {
      place.buffer = warp.block->shared.get();
      const uint64_t offset = step.space == Space::kShared ? address : address - kSharedWindow;
      place.address = place.buffer->data() + offset;
      if (!place.buffer->Holds(place.address, bytes))
        fault("outside of shared memory: byte " + std::to_string(offset) + " of " +
              std::to_string(shared_bytes_));
    } else {
      place.address = reinterpret_cast<char*>(address);
      if (last_ == nullptr || !last_->Holds(place.address, bytes))
        last_ = machine_.FindBuffer(place.address, bytes);
      place.buffer = last_;
      if (last_ == nullptr) fault("outside of all buffers" + Nearest(place.address));
    }
    if (step.kind != Kind::kLoad && !place.buffer->writable())
      fault("writes to " + place.buffer->name() + ", which is read only");
    if (step.kind != Kind::kStore && !place.buffer->IsWritten(place.address, bytes))
      fault("reads what was never written: byte " +
            std::to_string(place.address - place.buffer->data()) + " of " + place.buffer->name());
    if (step.constant && place.buffer->WrittenIn(machine_.launch_, place.address))
      fault("reads as constant what this launch has written");
    if (step.kind != Kind::kLoad) place.buffer->MarkWritten(place.address, bytes);
    if (!machine_.configuration.races) return place;
    const Actor actor = {{GridWarp(warp), warp.round, static_cast<uint16_t>(lane)},
                         warp.known.get(),
                         AcquiredBy(warp, lane)};
    for (const Access access : {Access::kRead, Access::kWrite}) {
      if (step.kind == (access == Access::kRead ? Kind::kStore : Kind::kLoad)) continue;
      const Moment* const other =
          place.buffer->Trace(place.address, bytes, access, step.strong, machine_.launch_, actor);
      if (other != nullptr)
        fault("a race in " + place.buffer->name() + " (byte " +
              std::to_string(place.address - place.buffer->data()) + ") with " + Whose(*other));
    }
    return place;
  }

  std::string Whose(const Moment& moment) const {
    const auto warps = static_cast<uint32_t>((threads_ + kLanes - 1) / kLanes);
    const uint32_t first = moment.warp % warps * kLanes;
    return "an access by " +
           (moment.lane == kManyLanes ? "several threads from " + std::to_string(first) + " on"
                                      : "thread " + std::to_string(first + moment.lane)) +
           " of block " + std::to_string(moment.warp / warps);
  }

  std::string Nearest(const char* address) const {
    const Buffer* nearest = nullptr;
    int64_t least = 0;
    for (const auto& buffer : machine_.buffers_) {
      const int64_t past = address - buffer->data();
      const int64_t distance = past < 0 ? -past : past - buffer->bytes();
      if (nearest == nullptr || distance < least) {
        nearest = buffer.get();
        least = distance;
      }
    }
    if (nearest == nullptr) return "";
    return ": byte " + std::to_string(address - nearest->data()) + " of " + nearest->name() +
           ", which has " + std::to_string(nearest->bytes());
  }

  bool AccessMemory(Warp* warp, Step* step, uint32_t mask) {
    if (step->space == Space::kParameter) {
      LoadParameter(*warp, *step, mask);
      return true;
    }
    uint64_t addresses[kLanes];
    uint64_t found = 0;  // what a poll finds, mixed
    bool changed = false;
    Buffer* touched = nullptr;
    EachActive(mask, [&](int lane) {
      addresses[lane] = AddressOf(*warp, *step, lane);
      const Place place = Locate(*warp, *step, lane, addresses[lane]);
      touched = place.buffer;
      if (step->strong) Synchronise(*warp, *step, lane, place.address);
      const auto bytes = static_cast<size_t>(step->bytes);
      if (step->kind == Kind::kAtomic) {
        uint64_t old = 0;
        std::memcpy(&old, place.address, bytes);
        const uint64_t now =
            old + LoadLane(warp->registers + step->values[0], step->lane_bytes, lane);
        std::memcpy(place.address, &now, bytes);
        changed |= std::memcmp(&now, &old, bytes) != 0;
        if (step->d >= 0) StoreLane(warp->registers + step->d, step->lane_bytes, lane, old);
        found = 31 * found + old;
        return;
      }
      for (size_t i = 0; i < step->values.size(); ++i) {
        char* const memory = place.address + i * bytes;
        if (step->values[i] < 0) continue;
        char* const lanes = warp->registers + step->values[i];
        if (step->kind == Kind::kStore) {
          const uint64_t value = LoadLane(lanes, step->lane_bytes, lane);
          std::memcpy(memory, &value, bytes);
          changed = true;
        } else {
          uint64_t value = 0;
          std::memcpy(&value, memory, bytes);
          StoreLane(lanes, step->lane_bytes, lane, Extend(value, step->bytes, step->sign));
          found = 31 * found + value;
        }
      }
    });
    const bool shared = touched == warp->block->shared.get();
    const bool local = touched == warp->local.get();
    const bool global = !shared && !local;
    if (step->space == Space::kGeneric) {  // what it is counted as shows now
      const std::string what = step->family.substr(0, step->family.find(' ') + 1);
      step->family = what + (shared ? "shared" : "global");
    }
    if (global) CountSectors(*warp, step, mask, addresses);
    if (shared) CountWavefronts(step, mask, addresses);
    if (!global && !step->strong) return true;
    if (changed) {
      ++progress_;
      warp->vain_polls = 0;
      warp->polls.clear();
    } else if (step->strong) {
      return Poll(warp, step, found);
    }
    return true;
  }

  // Whether the warp goes on: not if it reads again what it has read here already.
  bool Poll(Warp* warp, Step* step, uint64_t found) {
    const auto [last, is_new] = warp->polls.try_emplace(warp->stack.back().pc, found);
    const bool again = !is_new && last->second == found;
    last->second = found;
    if (!again) return true;
    warp->vain_polls = warp->poll_progress == progress_ ? warp->vain_polls + 1 : 0;
    warp->poll_progress = progress_;
    warp->polling = true;
    ++step->tally.spins;
    return false;
  }

  void LoadParameter(const Warp& warp, const Step& step, uint32_t mask) {
    EachActive(mask, [&](int lane) {
      const uint64_t at = AddressOf(warp, step, lane);
      const auto bytes = static_cast<size_t>(step.bytes);
      if (at + bytes * step.values.size() > parameters_.size())
        Fault(warp, 1u << lane, step, "outside of the parameters");
      for (size_t i = 0; i < step.values.size(); ++i) {
        uint64_t value = 0;
        std::memcpy(&value, parameters_.data() + at + i * bytes, bytes);
        if (step.values[i] >= 0)
          StoreLane(warp.registers + step.values[i], step.lane_bytes, lane,
                    Extend(value, step.bytes, step.sign));
      }
    });
  }

  void CountSectors(const Warp& warp, Step* step, uint32_t mask, const uint64_t* addresses) {
    // Lanes' neighbours mostly follow each other.
    uint64_t sectors[kLanes * 2];
    int count = 0;
    const auto bytes = static_cast<uint64_t>(step->bytes) *
                       (step->kind == Kind::kAtomic ? 1 : step->values.size());
    EachActive(mask, [&](int lane) {
      for (uint64_t s = addresses[lane] / kSectorBytes;
           s <= (addresses[lane] + bytes - 1) / kSectorBytes; ++s) {
        if (count == 0 || sectors[count - 1] != s) sectors[count++] = s;
      }
    });
    std::sort(sectors, sectors + count);
    count = static_cast<int>(std::unique(sectors, sectors + count) - sectors);
    Tally& tally = step->tally;
    tally.sectors += count;
    Cache& l1 = l1_[static_cast<size_t>(warp.block->slot) % l1_.size()];
    if (step->acquire) l1.Clear();
    const bool writes = step->kind != Kind::kLoad;
    int64_t ignored = 0;
    for (int i = 0; i < count; ++i) {
      // L1 writes through, and has nothing of what is to be seen by others.
      if (!writes && !step->strong && l1.Touch(sectors[i], false, &ignored)) continue;
      ++tally.from_l2;
      tally.from_dram += !machine_.l2_.Touch(sectors[i], writes, &machine_.written_back_);
    }
  }

  // A warp's access to shared memory takes, for every 128 bytes that its lanes want, as many cycles
  // as there are different words in one of the 32 banks.
  static void CountWavefronts(Step* step, uint32_t mask, const uint64_t* addresses) {
    const auto bytes = static_cast<uint64_t>(step->bytes) *
                       (step->kind == Kind::kAtomic ? 1 : step->values.size());
    const int words = std::max(1, static_cast<int>(bytes / 4)), at_once = kLanes / words;
    for (int first = 0; first < kLanes; first += at_once) {
      std::vector<uint64_t> wanted;
      EachActive(at_once == kLanes ? mask : mask & (((1u << at_once) - 1) << first), [&](int lane) {
        for (int w = 0; w < words; ++w)
          wanted.push_back(addresses[lane] / 4 + static_cast<uint64_t>(w));
      });
      if (wanted.empty()) continue;
      std::sort(wanted.begin(), wanted.end());
      wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
      int in_bank[32] = {}, most = 0;
      for (uint64_t word : wanted) most = std::max(most, ++in_bank[word % 32]);
      step->tally.wavefronts += most;
      step->tally.least += 1;
    }
  }

  // ---- order between blocks ---------------------------------------------------------------------

  uint32_t GridWarp(const Warp& warp) const {
    return warp.block->index * static_cast<uint32_t>((threads_ + kLanes - 1) / kLanes) +
           static_cast<uint32_t>(warp.index);
  }
  static Learnt& LearntBy(const Warp& warp, int lane) {
    return const_cast<Warp&>(warp).learnt[lane];
  }
  const Knowledge* AcquiredBy(const Warp& warp, int lane) const {
    const auto found = warp.learnt.find(lane);
    return found == warp.learnt.end() ? &nothing_ : &found->second.acquired;
  }
  // All that a thread knows to be done, its own work included.
  Knowledge KnownTo(const Warp& warp, int lane) const {
    Knowledge known = *warp.known;
    Learn(&known, *AcquiredBy(warp, lane));
    Learn(&known, {{GridWarp(warp), warp.round, static_cast<uint16_t>(lane)}});
    return known;
  }
  // An atomic access takes over what was released there: to all blocks, or to its own.
  void Synchronise(const Warp& warp, const Step& step, int lane, const char* address) {
    if (!machine_.configuration.races) return;
    Released& here = released_[address];
    Knowledge& to_own = here.to_block[warp.block->index];
    if (step.kind != Kind::kStore) {
      Learnt& learnt = LearntBy(warp, lane);
      Knowledge* const to = step.acquire ? &learnt.acquired : &learnt.loaded;
      Learn(to, to_own);
      if (step.beyond) Learn(to, here.to_all);
    }
    if (step.kind == Kind::kLoad) return;
    Knowledge known;
    if (step.release) {
      known = KnownTo(warp, lane);
    } else {
      const auto found = warp.learnt.find(lane);
      if (found == warp.learnt.end()) return;
      known = found->second.published;
    }
    Learn(&to_own, known);
    if (step.beyond) Learn(&here.to_all, known);
  }

  // ---- messages ---------------------------------------------------------------------------------

  std::string Where(const Warp& warp, int lane, const Step& step) const {
    std::string text = Demangle(kernel_.name) + ", block " + std::to_string(warp.block->index) +
                       ", thread " + std::to_string(warp.index * kLanes + lane);
    const std::vector<Location>& locations = kernel_.program->locations;
    const char* join = ", ";
    for (int at = step.source->location; at >= 0; at = locations[static_cast<size_t>(at)].parent) {
      const Location& location = locations[static_cast<size_t>(at)];
      text += join + location.file + ":" + std::to_string(location.line);
      join = ", called at ";
    }
    return text + ", in `" + step.source->text + "`";
  }
  [[noreturn]] void Fault(const Warp& warp, uint32_t mask, const Step& step,
                          const std::string& what) const {
    throw Error(Where(warp, mask == 0 ? 0 : __builtin_ctz(mask), step) + ": " + what);
  }

  Machine& machine_;
  Kernel& kernel_;
  const Dimensions grid_, block_;
  const int threads_;
  const int64_t shared_bytes_;
  const std::vector<char> parameters_;
  std::mt19937_64 random_;
  const bool seeded_;
  std::vector<std::unique_ptr<Block>> running_;
  std::vector<int> free_slots_;
  std::vector<Cache> l1_;
  Buffer* last_ = nullptr;
  int64_t progress_ = 0, steps_ = 0;
  struct Released {
    Knowledge to_all;
    std::map<uint32_t, Knowledge> to_block;
  };
  std::unordered_map<const char*, Released> released_;
  const Knowledge nothing_;
};

Machine::Machine() : l2_(configuration.l2_bytes) {}
Machine::~Machine() = default;

int Machine::Load(const std::string& ptx) {
  modules_.push_back(std::make_unique<Program>(ParseProgram(ptx)));
  return static_cast<int>(modules_.size()) - 1;
}

Kernel* Machine::FindKernel(int module, const std::string& name) {
  std::unique_ptr<Kernel>& kernel = kernels_[{module, name}];
  if (kernel == nullptr) {
    Program* const program = modules_.at(static_cast<size_t>(module)).get();
    if (program->bodies.count(name) == 0) throw Error("no kernel " + name);
    auto made = std::make_unique<Kernel>();
    made->name = name;
    made->program = program;
    made->function = ParseFunction(program, name);
    Compile(made.get());
    kernel = std::move(made);
  }
  return kernel.get();
}

void Machine::Launch(int module, const std::string& name, Dimensions grid, Dimensions block,
                     int64_t dynamic_shared_bytes, const void* const* parameters) {
  Kernel* const kernel = FindKernel(module, name);
  const Function& function = kernel->function;
  std::vector<char> bytes(static_cast<size_t>(function.parameter_bytes));
  for (size_t i = 0; i < function.parameter_order.size(); ++i) {
    const Variable& variable = function.parameter_order[i];
    std::memcpy(bytes.data() + variable.offset, parameters[i], static_cast<size_t>(variable.bytes));
  }
  ++launch_;
  ++kernel->launches;
  Grid(this, kernel, grid, block, function.shared_bytes + dynamic_shared_bytes, std::move(bytes))
      .Run();
}

void Machine::Fill(char* address, int value, int64_t bytes) {
  if (bytes == 0) return;
  Buffer* const buffer = FindBuffer(address, bytes);
  if (buffer == nullptr || !buffer->writable()) throw Error("a fill outside of all buffers");
  std::memset(address, value, static_cast<size_t>(bytes));
  buffer->MarkWritten(address, bytes);
}

void Machine::AddBuffer(const std::string& name, char* data, int64_t bytes, bool written,
                        bool writable) {
  buffers_.push_back(
      std::make_unique<Buffer>(name, data, bytes, written, writable, configuration.races));
}
void Machine::RemoveBuffers() { buffers_.clear(); }
Buffer* Machine::FindBuffer(const char* address, int64_t bytes) {
  for (const auto& buffer : buffers_) {
    if (buffer->Holds(address, bytes)) return buffer.get();
  }
  return nullptr;
}

std::vector<const Kernel*> Machine::Kernels() const {
  std::vector<const Kernel*> kernels;
  for (const auto& [key, kernel] : kernels_) {
    if (kernel != nullptr && kernel->launches > 0) kernels.push_back(kernel.get());
  }
  return kernels;
}

void Machine::ResetCounts() {
  for (const auto& [key, kernel] : kernels_) {
    if (kernel == nullptr) continue;
    kernel->launches = 0;
    for (Step& step : kernel->steps) step.tally = {};
  }
  l2_ = Cache(configuration.l2_bytes);
  written_back_ = 0;
}

}  // namespace ptx
}  // namespace cbam_ops
