// Executes the PTX of kernels, checks what they do and counts it.
//
//   blocks    as many as fit the machine run at once; a seed decides which warp goes on, and for how
//             long. Seed 0: a block, and in it a warp, runs until it waits or ends. A thread that
//             polls memory which nobody changes lets others run; if all do, that is a deadlock
//   warps     execute one instruction for all lanes that stand at it; lanes that parted at a branch
//             meet again at its immediate post-dominator
//   memory    global addresses are addresses of this process. Every access must lie inside one
//             buffer that was announced, be aligned, and read what has been written
//   races     two threads that access the same bytes, one of them writing, are ordered by barriers
//             or, between blocks, by a release and an acquire at the scope of the GPU
//   faults    end the launch: an Error names kernel, block, thread, source line and instruction
//
// What is counted is kept per instruction, so that it can be asked by kernel, line or kind.
#ifndef CBAM_OPS_TESTING_PTX_MACHINE_H_
#define CBAM_OPS_TESTING_PTX_MACHINE_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "testing/ptx/arithmetic.h"
#include "testing/ptx/memory.h"
#include "testing/ptx/program.h"

namespace cbam_ops {
namespace ptx {

// Where generic addresses of shared memory start: no addresses of a process.
constexpr uint64_t kSharedWindow = uint64_t{0x5a} << 56;
constexpr uint64_t kWindowBytes = 1 << 24;

struct Configuration {
  int multiprocessors = 4;
  int blocks_per_multiprocessor = 2;
  int64_t l1_bytes = 64 << 10;  // per multiprocessor
  int64_t l2_bytes = 1 << 20;
  uint64_t seed = 0;
  bool races = true;
};

// What was counted of one instruction.
struct Tally {
  int64_t issued = 0;      // by warps
  int64_t sectors = 0;     // of global memory, over all accesses of a warp
  int64_t from_l2 = 0;     // of these, what L1 did not have; all that are written
  int64_t from_dram = 0;   // of these, what L2 did not have
  int64_t wavefronts = 0;  // of shared memory: cycles, more than `least` where banks conflict
  int64_t least = 0;
  int64_t spins = 0;  // polls that found nothing new
};

enum class Kind {
  kLanes,
  kPack,
  kUnpack,
  kLoad,
  kStore,
  kAtomic,
  kBarrier,
  kWarpBarrier,
  kShuffle,
  kBranch,
  kExit,
  kTrap,
  kFence,
  kNothing,
};
enum class Space { kGeneric, kGlobal, kShared, kLocal, kParameter };

// An instruction, ready to run. Registers are offsets into a warp's file.
struct Step {
  Kind kind = Kind::kNothing;
  LaneFunction function = nullptr;
  int d = 0, a = 0, b = 0, c = 0, e = 0, mode = 0;
  int guard = -1;
  bool guard_negated = false;
  // Memory: `values` of `bytes` each, in lanes of `lane_bytes`.
  Space space = Space::kGlobal;
  int bytes = 0, lane_bytes = 0, base_bytes = 0;
  std::vector<int> values;
  int64_t offset = 0;
  bool sign = false, constant = false;
  // Memory's order: an atomic access; one that other blocks may rely on; what it does.
  bool strong = false, beyond = false, acquire = false, release = false;
  std::string word;  // of a shuffle: from where
  int target = -1, meet = -1;
  std::string family;
  const Statement* source = nullptr;
  Tally tally;
};

struct Kernel {
  std::string name;
  Program* program;
  Function function;
  std::vector<Step> steps;
  int64_t register_bytes = 0;
  struct Preset {
    int at, bytes;  // bytes 0: a predicate
    uint64_t value;
    std::string special;  // if not empty, the value is that special register's
  };
  std::vector<Preset> presets;
  int64_t launches = 0;
};

using Dimensions = std::array<uint32_t, 3>;

class Machine {
 public:
  Machine();
  ~Machine();

  Configuration configuration;

  // The handle of a module; kernels are compiled when first launched.
  int Load(const std::string& ptx);
  void Launch(int module, const std::string& kernel, Dimensions grid, Dimensions block,
              int64_t dynamic_shared_bytes, const void* const* parameters);
  // Sets memory, as a launch of its own.
  void Fill(char* address, int value, int64_t bytes);

  void AddBuffer(const std::string& name, char* data, int64_t bytes, bool written, bool writable);
  void RemoveBuffers();
  Buffer* FindBuffer(const char* address, int64_t bytes);

  // Kernels launched so far, with what was counted of them.
  std::vector<const Kernel*> Kernels() const;
  // Sectors written to memory: those that had to leave L2, and those still to leave.
  int64_t SectorsWritten() const { return written_back_ + l2_.WrittenSectors(); }
  // Forgets counts and what the caches hold.
  void ResetCounts();

 private:
  friend class Grid;
  Kernel* FindKernel(int module, const std::string& name);

  std::vector<std::unique_ptr<Program>> modules_;
  std::map<std::pair<int, std::string>, std::unique_ptr<Kernel>> kernels_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  Cache l2_;
  int64_t written_back_ = 0;
  uint32_t launch_ = 0;
};

// Fills a kernel that has a name and a program; an Error names all unknown opcodes.
void Compile(Kernel* kernel);

}  // namespace ptx
}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_PTX_MACHINE_H_
