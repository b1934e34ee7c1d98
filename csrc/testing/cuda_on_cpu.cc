// The scheduler of fibers behind cuda_on_cpu.h. Compiled without -fsanitize=thread: what happens
// here must neither be seen as a race nor synchronise anything but what the barriers announce.
#include "testing/cuda_on_cpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
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

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarpLanes = 32;

enum class Waiting { kNothing, kBlock, kWarp, kCounter, kEnded };

const char* Describe(Waiting waiting) {
  switch (waiting) {
    case Waiting::kBlock:
      return "a barrier";
    case Waiting::kWarp:
      return "a warp shuffle";
    case Waiting::kCounter:
      return "a counter";
    default:
      return "nothing";
  }
}

struct Fiber;

// What a group of threads waits at. TSan identifies it by its address.
struct Meeting {
  int members = 0;
  int64_t generation = 0;
  std::vector<Fiber*> waiting;
};

struct WarpState {
  Meeting meeting;
  uint64_t slots[2][kWarpLanes];
};

struct BlockState {
  int64_t index = -1;
  int running = 0;  // threads that have not ended
  unsigned char* shared = nullptr;
  Meeting whole, part;  // the block's barrier, and one of its first threads
  std::vector<WarpState> warps;
};

struct Fiber {
  void* stack_pointer = nullptr;  // of the assembly switch
  ucontext_t context;             // where there is none
  unsigned char* stack = nullptr;
  int thread = 0;
  BlockState* block = nullptr;
  Waiting waiting = Waiting::kNothing;
  // What it waits for at a counter: this, or a flag with a value.
  const uint32_t* counter = nullptr;
  uint32_t target = 0;
  const uint32_t* flag = nullptr;
  uint32_t value = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

// Threads in the order in which they came. Like all lists here it has its memory before the threads
// run: an allocation or a memmove would be theirs to ThreadSanitizer.
struct Ring {
  std::vector<Fiber*> places;
  size_t first = 0, size = 0;

  void Reset(size_t most) {
    places.assign(most, nullptr);
    first = size = 0;
  }
  Fiber*& At(size_t i) { return places[(first + i) % places.size()]; }
  void Push(Fiber* fiber) {
    ++size;
    At(size - 1) = fiber;
  }
  Fiber* Pop() {
    Fiber* const fiber = At(0);
    first = (first + 1) % places.size();
    --size;
    return fiber;
  }
};

struct Runtime {
  std::vector<Fiber> fibers;
  std::vector<BlockState> blocks;
  Ring ready;
  std::vector<Fiber*> at_counters;
  std::vector<unsigned char*> stacks;
  std::vector<void*> tsan_fibers;
  BlockState* ended = nullptr;  // its last thread has just ended
  Fiber main;
  Fiber* current = nullptr;
  LaunchShape shape;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  uint64_t seed = 0;
  uint64_t random = 0;
  std::string names, taken;
  bool failed = false;
  FailureHandler handler = nullptr;
  char start_token = 0, end_token = 0;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;

  uint64_t Draw(uint64_t bound) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return (random >> 33) % bound;
  }
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

void Wake(Fiber* fiber) {
  fiber->waiting = Waiting::kNothing;
  State().ready.Push(fiber);
}

// Runs a thread that can run; the main fiber when there is none, or a block to put away.
void Yield() {
  Runtime& state = State();
  if (state.ready.size == 0 || state.ended != nullptr) return SwitchTo(&state.main);
  // In turn, or any: of a few of the oldest, or of all.
  if (state.seed != 0) {
    const uint64_t among =
        state.Draw(8) > 0 ? std::min<uint64_t>(state.ready.size, 300) : state.ready.size;
    std::swap(state.ready.At(0), state.ready.At(state.Draw(among)));
  }
  SwitchTo(state.ready.Pop());
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
  if (--state.current->block->running == 0) state.ended = state.current->block;
  Yield();
  std::abort();  // an ended fiber is never resumed
}

// Waits until all members have come.
void Meet(Meeting* meeting, Waiting kind, bool synchronises) {
  Fiber* self = State().current;
  if (synchronises) Release(meeting);
  if (static_cast<int>(meeting->waiting.size()) + 1 == meeting->members) {
    ++meeting->generation;
    for (Fiber* fiber : meeting->waiting) Wake(fiber);
    meeting->waiting.clear();
  } else {
    self->waiting = kind;
    meeting->waiting.push_back(self);
    Yield();
  }
  if (synchronises) Acquire(meeting);
}

bool HasCome(const Fiber& fiber) {
  return *fiber.counter >= fiber.target || (fiber.flag != nullptr && *fiber.flag == fiber.value);
}

// Wakes those at counters for whom a change was the last that they waited for.
void WakeAtCounters() {
  auto& waiting = State().at_counters;
  size_t kept = 0;
  for (Fiber* fiber : waiting) {
    if (HasCome(*fiber)) {
      Wake(fiber);
    } else {
      waiting[kept++] = fiber;
    }
  }
  waiting.resize(kept);
}

}  // namespace

int ThreadIndex() { return State().current->thread; }
unsigned char* SharedMemory() { return State().current->block->shared; }

void Barrier(int threads) {
  Runtime& state = State();
  BlockState* block = state.current->block;
  const bool whole = threads == state.shape.threads;
  Meeting* const meeting = whole ? &block->whole : &block->part;
  meeting->members = threads;
  Meet(meeting, Waiting::kBlock, true);
}

void ForgetShared(size_t offset) {
  Runtime& state = State();
  std::memset(state.current->block->shared + offset, 0xff, state.shape.shared_bytes - offset);
}

uint64_t ExchangeBits(uint64_t value, int mask) {
  Fiber* self = State().current;
  const int warp = self->thread / kWarpLanes, lane = self->thread % kWarpLanes;
  WarpState& slots = self->block->warps[warp];
  // Two sets of slots in turn: nobody can be two exchanges ahead of a lane that has not read yet.
  uint64_t* turn = slots.slots[slots.meeting.generation & 1];
  turn[lane] = value;
  // A shuffle orders no memory accesses: nothing is announced to ThreadSanitizer.
  Meet(&slots.meeting, Waiting::kWarp, false);
  return turn[(lane ^ mask) % kWarpLanes];
}

uint64_t TakeTicket(uint64_t* next) { return (*next)++; }

void AddRelease(uint32_t* counter) {
  Release(counter);
  ++*counter;
  WakeAtCounters();
}

void Publish(uint32_t* flag, uint32_t value) {
  Release(flag);
  *flag = value;
  WakeAtCounters();
}

bool WaitUnless(const uint32_t* counter, uint32_t target, const uint32_t* flag, uint32_t value) {
  Fiber* self = State().current;
  self->counter = counter;
  self->target = target;
  self->flag = flag;
  self->value = value;
  if (!HasCome(*self)) {
    self->waiting = Waiting::kCounter;
    State().at_counters.push_back(self);
    Yield();
  }
  const bool counted = *counter >= target;
  Acquire(const_cast<uint32_t*>(counted ? counter : flag));
  return counted;
}

void WaitAcquire(const uint32_t* counter, uint32_t target) {
  WaitUnless(counter, target, nullptr, 0);
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

namespace {

// Puts a block in a place of those that run, and its threads among those that can.
bool Start(BlockState* block, int64_t index, Fiber* fibers) {
  Runtime& state = State();
  const int threads = state.shape.threads;
  *block = BlockState();
  block->index = index;
  block->running = threads;
  // The size is exact for AddressSanitizer to see what lies beyond; 0xff everywhere is NaN in every
  // type.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, std::max<size_t>(state.shape.shared_bytes, 1)) != 0) {
    Fail("no memory for shared memory");
    return false;
  }
  std::memset(shared, 0xff, state.shape.shared_bytes);
  block->shared = static_cast<unsigned char*>(shared);
  block->warps.resize(threads / kWarpLanes);
  for (WarpState& warp : block->warps) {
    warp.meeting.members = kWarpLanes;
    warp.meeting.waiting.reserve(kWarpLanes);
  }
  block->whole.waiting.reserve(static_cast<size_t>(threads));
  block->part.waiting.reserve(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) {
    fibers[i].thread = i;
    fibers[i].block = block;
    Prepare(&fibers[i]);
    Wake(&fibers[i]);
  }
  return true;
}

}  // namespace

void Run(const LaunchShape& shape, void (*body)(const void*), const void* argument) {
  Runtime& state = State();
  state.shape = shape;
  state.body = body;
  state.argument = argument;
  state.failed = false;
  state.ended = nullptr;
  state.at_counters.clear();
  state.random = state.seed;
  state.names += std::string(shape.kernel) + " ";
  if (shape.threads % kWarpLanes != 0 || shape.threads < 1 || shape.threads > 1024)
    return Fail("bad block size");
  if (shape.shared_bytes > 48 * 1024) return Fail("too much shared memory");

  const int64_t most = PretendedDevice().resident_blocks;
  const auto places = static_cast<size_t>(most > 0 ? std::min(most, shape.blocks) : shape.blocks);
  const size_t count = places * static_cast<size_t>(shape.threads);
  state.fibers.clear();
  state.fibers.resize(count);
  state.ready.Reset(count);
  state.at_counters.reserve(count);
  while (state.stacks.size() < count) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) return Fail("no memory for stacks");
    state.stacks.push_back(static_cast<unsigned char*>(stack));
  }
  for (size_t i = 0; i < count; ++i) {
    state.fibers[i].stack = state.stacks[i];
#if defined(CBAM_TSAN)
    // Made once: a launch starts by acquiring what came before, not by being new.
    if (state.tsan_fibers.size() <= i) state.tsan_fibers.push_back(__tsan_create_fiber(0));
    state.fibers[i].tsan = state.tsan_fibers[i];
#endif
  }
#if defined(CBAM_TSAN)
  state.main.tsan = __tsan_get_current_fiber();
#endif
  state.main.waiting = Waiting::kNothing;
  state.current = &state.main;

  std::vector<int64_t> order(static_cast<size_t>(shape.blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (state.seed != 0) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[state.Draw(i)]);
  }
  state.blocks.clear();
  state.blocks.resize(places);
  size_t started = 0, running = 0;
  const auto start = [&](BlockState* block) {
    const auto place = static_cast<size_t>(block - state.blocks.data());
    running += Start(block, order[started++], &state.fibers[place * shape.threads]) ? 1 : 0;
    Release(&state.start_token);
  };
  for (BlockState& block : state.blocks) start(&block);
  while (running > 0 && !state.failed) {
    Yield();  // until nothing can run, or a block has ended
    Acquire(&state.end_token);
    if (state.ended == nullptr) {
      for (const Fiber& fiber : state.fibers) {
        if (fiber.waiting == Waiting::kEnded) continue;
        Fail("block " + std::to_string(fiber.block->index) + " thread " +
             std::to_string(fiber.thread) + " waits for " + Describe(fiber.waiting) +
             " that others never reach");
        break;
      }
      break;
    }
    BlockState* const ended = std::exchange(state.ended, nullptr);
    std::free(std::exchange(ended->shared, nullptr));
    --running;
    if (started < order.size()) start(ended);
  }
  for (BlockState& block : state.blocks) std::free(block.shared);
}

Device& PretendedDevice() {
  static Device device;
  return device;
}
void SetSchedule(uint64_t seed) { State().seed = seed; }
const char* TakeLaunchedKernels() {
  Runtime& state = State();
  state.taken.swap(state.names);
  state.names.clear();
  return state.taken.c_str();
}
void SetFailureHandler(FailureHandler handler) { State().handler = handler; }

}  // namespace cuda_on_cpu
}  // namespace cbam_ops
