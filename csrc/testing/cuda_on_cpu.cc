// The scheduler of fibers behind cuda_on_cpu.h. Compiled without -fsanitize=thread: what happens
// here must neither be seen as a race nor synchronise anything but what the barriers announce.
#include "testing/cuda_on_cpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CBAM_ASAN 1
#endif
#if defined(CBAM_TSAN)  // defined by whoever links this file with ThreadSanitizer
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace cbam_ops {
namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarpLanes = 32;

enum class Waiting { kNothing, kBlock, kWarp, kCluster, kCopy, kEnded };

const char* Describe(Waiting waiting) {
  switch (waiting) {
    case Waiting::kBlock:
      return "a block barrier";
    case Waiting::kWarp:
      return "a warp shuffle";
    case Waiting::kCluster:
      return "a cluster barrier";
    case Waiting::kCopy:
      return "a bulk copy";
    default:
      return "nothing";
  }
}

// What a group of threads waits at. TSan identifies it by its address.
struct Meeting {
  int members = 0;
  int arrived = 0;
  int64_t generation = 0;
};

struct Fiber;

struct WarpState {
  Meeting meeting;
  uint64_t slots[2][kWarpLanes];
};

struct Copy {
  void* destination;
  const void* source;
  uint32_t bytes;
};

struct CopyBarrier {
  int64_t expected = 0;
  int64_t queued = 0;
  bool armed = false;
  int phase = 0;  // of the transfer under way
  std::vector<Copy> copies;
};

struct BlockState {
  int64_t index = 0;
  int rank = 0;
  unsigned char* shared = nullptr;
  Meeting meeting;
  std::vector<WarpState> warps;
  std::map<uint64_t*, CopyBarrier> copy_barriers;
};

struct Fiber {
  void* stack_pointer = nullptr;  // of the assembly switch
  ucontext_t context;             // where there is none
  unsigned char* stack = nullptr;
  int thread = 0;
  BlockState* block = nullptr;
  Waiting waiting = Waiting::kNothing;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

struct Runtime {
  std::vector<Fiber> fibers;
  std::vector<BlockState> blocks;
  std::vector<int> order;
  std::vector<unsigned char*> stacks;
  std::vector<void*> tsan_fibers;
  Meeting cluster;
  Fiber main;
  Fiber* current = nullptr;
  size_t position = 0;  // in `order`
  LaunchShape shape;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  uint64_t seed = 0;
  int64_t launches = 0;
  std::string names, taken;
  bool failed = false;
  FailureHandler handler = nullptr;
  char start_token = 0, end_token = 0;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};

Runtime& State() {
  static Runtime* runtime = new Runtime;
  return *runtime;
}

void Fail(const std::string& message) {
  Runtime& state = State();
  state.failed = true;
  if (state.handler != nullptr) {
    state.handler(message.c_str());
    return;
  }
  std::fprintf(stderr, "cuda_on_cpu: kernel %s: %s\n", state.shape.kernel, message.c_str());
  std::abort();
}

void Acquire([[maybe_unused]] void* token) {
#if defined(CBAM_TSAN)
  __tsan_acquire(token);
#endif
}
void Release([[maybe_unused]] void* token) {
#if defined(CBAM_TSAN)
  __tsan_release(token);
#endif
}

// ---- switching ----------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what the ABI says a call preserves, changes stacks, restores.
asm(R"(
.text
.type cbam_switch_stacks, @function
cbam_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cbam_switch_stacks, .-cbam_switch_stacks
)");
extern "C" void cbam_switch_stacks(void** save, void* load) __asm__("cbam_switch_stacks");
#endif

void Entry();

void Prepare(Fiber* fiber) {
#if defined(CBAM_ASAN)
  // The frames of the thread that had this stack before are gone.
  __asan_unpoison_memory_region(fiber->stack, kStackBytes);
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(fiber->stack + kStackBytes);
  *--top = 0;                                   // as if called from address 0
  *--top = reinterpret_cast<uint64_t>(&Entry);  // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber->stack_pointer = top;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, &Entry, 0);
#endif
}

void SwitchTo(Fiber* to) {
  Runtime& state = State();
  Fiber* from = state.current;
  if (from == to) return;
  state.current = to;
#if defined(CBAM_ASAN)
  const bool to_main = to == &state.main;
  __sanitizer_start_switch_fiber(from->waiting == Waiting::kEnded ? nullptr : &from->fake_stack,
                                 to_main ? state.main_stack : to->stack,
                                 to_main ? state.main_stack_bytes : kStackBytes);
#endif
#if defined(CBAM_TSAN)
  __tsan_switch_to_fiber(to->tsan, /*no synchronisation*/ 1);
#endif
#if defined(__x86_64__)
  cbam_switch_stacks(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
#if defined(CBAM_ASAN)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// Runs the next thread that can run; the main fiber when there is none.
void Yield() {
  Runtime& state = State();
  const size_t count = state.order.size();
  for (size_t step = 1; step <= count; ++step) {
    size_t at = state.position + step;
    if (at >= count) at -= count;
    Fiber* fiber = &state.fibers[state.order[at]];
    if (fiber->waiting == Waiting::kNothing) {
      state.position = at;
      SwitchTo(fiber);
      return;
    }
  }
  SwitchTo(&state.main);
}

void Entry() {
  Runtime& state = State();
#if defined(CBAM_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (state.main_stack == nullptr) {
    state.main_stack = bottom;
    state.main_stack_bytes = bytes;
  }
#endif
  Acquire(&state.start_token);
  state.body(state.argument);
  Release(&state.end_token);
  state.current->waiting = Waiting::kEnded;
  Yield();
  std::abort();  // an ended fiber is never resumed
}

// Waits until all members have come; `wake` names those who wait with the caller.
template <typename Wake>
void Meet(Meeting* meeting, Waiting kind, bool synchronises, Wake same_group) {
  Runtime& state = State();
  Fiber* self = state.current;
  if (synchronises) Release(meeting);
  if (++meeting->arrived == meeting->members) {
    meeting->arrived = 0;
    ++meeting->generation;
    for (Fiber& fiber : state.fibers) {
      if (fiber.waiting == kind && same_group(fiber)) fiber.waiting = Waiting::kNothing;
    }
  } else {
    self->waiting = kind;
    Yield();
  }
  if (synchronises) Acquire(meeting);
}

}  // namespace

int ThreadIndex() { return State().current->thread; }
int64_t BlockIndex() { return State().current->block->index; }
unsigned char* SharedMemory() { return State().current->block->shared; }
int ClusterRank() { return State().current->block->rank; }
int ClusterSize() { return State().shape.cluster; }

void Barrier() {
  BlockState* block = State().current->block;
  Meet(&block->meeting, Waiting::kBlock, true,
       [block](const Fiber& fiber) { return fiber.block == block; });
}

void ClusterBarrier() {
  Meet(&State().cluster, Waiting::kCluster, true, [](const Fiber&) { return true; });
}

uint64_t ExchangeBits(uint64_t value, int mask) {
  Fiber* self = State().current;
  BlockState* block = self->block;
  const int warp = self->thread / kWarpLanes, lane = self->thread % kWarpLanes;
  WarpState& slots = block->warps[warp];
  // Two sets of slots in turn: nobody can be two exchanges ahead of a lane that has not read yet.
  uint64_t* turn = slots.slots[slots.meeting.generation & 1];
  turn[lane] = value;
  // A shuffle orders no memory accesses: nothing is announced to ThreadSanitizer.
  Meet(&slots.meeting, Waiting::kWarp, false, [block, warp](const Fiber& fiber) {
    return fiber.block == block && fiber.thread / kWarpLanes == warp;
  });
  return turn[(lane ^ mask) % kWarpLanes];
}

void* MapToRank(void* pointer, int rank) {
  Runtime& state = State();
  const ptrdiff_t offset = static_cast<unsigned char*>(pointer) - state.current->block->shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(state.shape.shared_bytes)) {
    Fail("MapToRank of an address outside shared memory");
  }
  return state.blocks[rank].shared + offset;
}

void InitCopyBarrier(uint64_t* barrier) {
  State().current->block->copy_barriers[barrier] = CopyBarrier();
}

void ExpectBytes(uint64_t* barrier, uint32_t bytes) {
  auto& barriers = State().current->block->copy_barriers;
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) return Fail("bytes expected at a barrier that was not initialised");
  if (found->second.armed) Fail("bytes expected twice in one phase");
  found->second.armed = true;
  found->second.expected += bytes;
  Release(barrier);
}

void BulkCopyToShared(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
  Runtime& state = State();
  BlockState* block = state.current->block;
  const auto found = block->copy_barriers.find(barrier);
  if (found == block->copy_barriers.end())
    return Fail("a bulk copy to a barrier that was not initialised");
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(destination) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    return Fail("a bulk copy whose addresses or size are no multiples of 16 bytes");
  }
  auto* to = static_cast<unsigned char*>(destination);
  if (to < block->shared || to + bytes > block->shared + state.shape.shared_bytes) {
    return Fail("a bulk copy beyond shared memory");
  }
  found->second.copies.push_back({destination, source, bytes});
  found->second.queued += bytes;
  Release(barrier);
}

void WaitForCopies(uint64_t* barrier, int parity) {
  Runtime& state = State();
  BlockState* block = state.current->block;
  for (;;) {
    const auto found = block->copy_barriers.find(barrier);
    if (found == block->copy_barriers.end())
      return Fail("a wait at a barrier that was not initialised");
    CopyBarrier& copies = found->second;
    if (copies.armed && copies.expected == copies.queued) {
      Acquire(barrier);
      for (const Copy& copy : copies.copies) std::memcpy(copy.destination, copy.source, copy.bytes);
      copies = CopyBarrier{0, 0, false, copies.phase ^ 1, {}};
      Release(barrier);
      for (Fiber& fiber : state.fibers) {
        if (fiber.waiting == Waiting::kCopy && fiber.block == block)
          fiber.waiting = Waiting::kNothing;
      }
    }
    if (copies.phase != parity) {
      Acquire(barrier);
      return;
    }
    // Those who complete the phase are other threads: let them run.
    state.current->waiting = Waiting::kCopy;
    bool others = false;
    for (Fiber& fiber : state.fibers) others |= fiber.waiting == Waiting::kNothing;
    if (!others) {
      Yield();  // reports the deadlock
      continue;
    }
    state.current->waiting = Waiting::kNothing;
    Yield();
  }
}

float HalfToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u, fraction = bits & 1023u;
  float magnitude;
  if (exponent == 31) {
    const uint32_t wide = 0x7f800000u | (fraction << 13);
    std::memcpy(&magnitude, &wide, sizeof(magnitude));
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25);
  }
  uint32_t wide;
  std::memcpy(&wide, &magnitude, sizeof(wide));
  wide |= sign;
  std::memcpy(&magnitude, &wide, sizeof(wide));
  return magnitude;
}

uint16_t FloatToHalf(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const auto sign = static_cast<uint16_t>((wide >> 16) & 0x8000u);
  if (value != value) return 0x7fff;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude == 0.0f) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  // The spacing of halves at this magnitude; nearbyint rounds to even.
  const int spacing = std::max(exponent - 11, -24);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -spacing)));
  uint32_t bits;
  if (spacing == -24) {
    bits = steps;  // subnormal, or rounded up to the first normal
  } else {
    bits = (static_cast<uint32_t>(spacing + 25) << 10) + (steps - 1024);
  }
  return static_cast<uint16_t>(sign | bits);
}

void Run(const LaunchShape& shape, void (*body)(const void*), const void* argument) {
  Runtime& state = State();
  state.shape = shape;
  state.body = body;
  state.argument = argument;
  state.failed = false;
  ++state.launches;
  state.names += std::string(shape.kernel) + " ";
  if (shape.threads % kWarpLanes != 0 || shape.threads < 1 || shape.threads > 1024)
    return Fail("bad block size");
  if (shape.cluster < 1 || shape.blocks % shape.cluster != 0)
    return Fail("the cluster does not divide the grid");
  if (static_cast<int64_t>(shape.shared_bytes) > PretendedDevice().shared_bytes)
    return Fail("too much shared memory");

  const int count = shape.threads * shape.cluster;
  state.fibers.clear();
  state.fibers.resize(count);
  while (static_cast<int>(state.stacks.size()) < count) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) return Fail("no memory for stacks");
    state.stacks.push_back(static_cast<unsigned char*>(stack));
  }
  for (int i = 0; i < count; ++i) {
    state.fibers[i].stack = state.stacks[i];
#if defined(CBAM_TSAN)
    // Made once: a launch starts by acquiring what came before, not by being new.
    if (static_cast<int>(state.tsan_fibers.size()) <= i)
      state.tsan_fibers.push_back(__tsan_create_fiber(0));
    state.fibers[i].tsan = state.tsan_fibers[i];
#endif
  }
#if defined(CBAM_TSAN)
  state.main.tsan = __tsan_get_current_fiber();
#endif
  state.main.waiting = Waiting::kNothing;
  state.current = &state.main;

  const int64_t groups = shape.blocks / shape.cluster;
  uint64_t random = state.seed * 6364136223846793005ull + 1442695040888963407ull;
  const auto draw = [&random](uint64_t bound) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return (random >> 33) % bound;
  };
  std::vector<int64_t> group_order(groups);
  for (int64_t g = 0; g < groups; ++g) group_order[g] = g;
  if (state.seed != 0) {
    for (int64_t g = groups - 1; g > 0; --g) std::swap(group_order[g], group_order[draw(g + 1)]);
  }
  for (const int64_t group : group_order) {
    state.blocks.clear();
    state.blocks.resize(shape.cluster);
    for (int rank = 0; rank < shape.cluster; ++rank) {
      BlockState& block = state.blocks[rank];
      block.index = group * shape.cluster + rank;
      block.rank = rank;
      // The size is exact for AddressSanitizer to see what lies beyond; 0xff everywhere is NaN in
      // every type.
      const size_t bytes = shape.shared_bytes;
      void* shared = nullptr;
      if (posix_memalign(&shared, 128, bytes > 0 ? bytes : 1) != 0)
        return Fail("no memory for shared memory");
      std::memset(shared, 0xff, bytes);
      block.shared = static_cast<unsigned char*>(shared);
      block.meeting.members = shape.threads;
      block.warps.resize(shape.threads / kWarpLanes);
      for (WarpState& warp : block.warps) warp.meeting.members = kWarpLanes;
    }
    state.cluster = Meeting{count, 0, 0};
    state.order.resize(count);
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = state.fibers[i];
      fiber.thread = i % shape.threads;
      fiber.block = &state.blocks[i / shape.threads];
      fiber.waiting = Waiting::kNothing;
      Prepare(&fiber);
      state.order[i] = i;
    }
    if (state.seed != 0) {
      for (int i = count - 1; i > 0; --i) std::swap(state.order[i], state.order[draw(i + 1)]);
    }
    state.position = count - 1;
    Release(&state.start_token);
    Yield();  // until nothing can run
    Acquire(&state.end_token);
    for (const Fiber& fiber : state.fibers) {
      if (fiber.waiting != Waiting::kEnded && !state.failed) {
        Fail("block " + std::to_string(fiber.block->index) + " thread " +
             std::to_string(fiber.thread) + " waits for " + Describe(fiber.waiting) +
             " that others never reach");
      }
    }
    for (BlockState& block : state.blocks) {
      for (const auto& barrier : block.copy_barriers) {
        if (barrier.second.queued > 0 && !state.failed)
          Fail("a block ended before its bulk copies");
      }
      std::free(block.shared);
    }
    if (state.failed) break;
  }
}

Device& PretendedDevice() {
  static Device device;
  return device;
}
void SetSchedule(uint64_t seed) { State().seed = seed; }
int64_t LaunchCount() { return State().launches; }
const char* TakeLaunchedKernels() {
  Runtime& state = State();
  state.taken.swap(state.names);
  state.names.clear();
  return state.taken.c_str();
}
void SetFailureHandler(FailureHandler handler) { State().handler = handler; }

}  // namespace cuda_on_cpu
}  // namespace cbam_ops
