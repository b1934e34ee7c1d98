// From statements to steps: operands become offsets into a warp's registers, opcodes functions, and
// every branch learns where its lanes meet again.
#include <algorithm>
#include <set>
#include <utility>

#include "testing/ptx/machine.h"

namespace cbam_ops {
namespace ptx {
namespace {

struct Unknown {};

class Compiler {
 public:
  explicit Compiler(Kernel* kernel) : kernel_(*kernel), function_(kernel->function) {}

  void Run() {
    for (const Register& reg : function_.registers) {
      lane_bytes_.push_back(reg.bits == 1 ? 0 : reg.bits <= 32 ? 4 : 8);
      at_.push_back(Allocate(lane_bytes_.back()));
    }
    std::set<std::string> unknown;
    std::vector<int> first_step;  // of the statements, and the end
    for (const Statement& statement : function_.statements) {
      first_step.push_back(static_cast<int>(kernel_.steps.size()));
      Step step;
      step.source = statement_ = &statement;
      if (statement.guard >= 0) step.guard = at_[static_cast<size_t>(statement.guard)];
      step.guard_negated = statement.guard_negated;
      try {
        CompileStatement(&step);
      } catch (Unknown) {
        unknown.insert(statement.opcode);
      }
    }
    first_step.push_back(static_cast<int>(kernel_.steps.size()));
    if (!unknown.empty()) {
      std::string all;
      for (const std::string& opcode : unknown) all += " " + opcode;
      throw Error(kernel_.name + ": unknown PTX:" + all);
    }
    for (Step& step : kernel_.steps) {
      if (step.kind == Kind::kBranch) step.target = first_step[static_cast<size_t>(step.target)];
    }
    FindMeetings();
    kernel_.register_bytes = end_;
  }

 private:
  int Allocate(int lane_bytes) {
    const auto at = static_cast<int>(end_);
    end_ += lane_bytes == 0 ? 64 : lane_bytes * kLanes;  // vectors of the processor stay aligned
    return at;
  }
  int Constant(uint64_t value, int lane_bytes, const std::string& special = "") {
    const auto [found, is_new] = constants_.try_emplace({value, lane_bytes, special}, 0);
    if (is_new) {
      found->second = Allocate(lane_bytes);
      kernel_.presets.push_back({found->second, lane_bytes, value, special});
    }
    return found->second;
  }

  // The operand's register, which has lanes of so many bytes.
  int Use(const Operand& operand, int lane_bytes) {
    if (operand.negated) throw Unknown();
    switch (operand.kind) {
      case Operand::Kind::kRegister: {
        const auto reg = static_cast<size_t>(operand.reg);
        if (lane_bytes_[reg] != lane_bytes) throw Unknown();
        return at_[reg];
      }
      case Operand::Kind::kConstant:
        return Constant(lane_bytes == 0 ? (operand.bits != 0 ? kAllLanes : 0) : operand.bits,
                        lane_bytes);
      case Operand::Kind::kSymbol:
        if (operand.symbol[0] == '%') return Constant(0, lane_bytes, operand.symbol);
        return Constant(static_cast<uint64_t>(AddressOf(operand.symbol)), lane_bytes);
      default:
        throw Unknown();
    }
  }
  int64_t AddressOf(const std::string& symbol) const {
    for (const auto* variables : {&function_.shared, &function_.local, &function_.parameters}) {
      const auto found = variables->find(symbol);
      if (found != variables->end()) return found->second.offset;
    }
    throw Error(function_.name + ": no variable " + symbol);
  }

  const Operand& At(size_t i) const {
    if (i >= statement_->operands.size()) throw Unknown();
    return statement_->operands[i];
  }

  void Add(const Step& step) { kernel_.steps.push_back(step); }

  void CompileStatement(Step* step) {
    Words words(statement_->opcode);
    const std::string name = words.front();
    words.Take(name);
    if (name == "bra") {
      words.Take("uni");
      Finish(words);
      const auto label = function_.labels.find(LabelKey(At(0).symbol, At(0).scope));
      if (label == function_.labels.end()) throw Unknown();
      step->kind = Kind::kBranch;
      step->family = "branch";
      step->target = label->second;  // a statement's index, until all steps are known
      return Add(*step);
    }
    if (name == "ret" || name == "exit" || name == "trap") {
      step->kind = name == "trap" ? Kind::kTrap : Kind::kExit;
      step->family = "branch";
      words.Take("uni");
    } else if (name == "ld" || name == "st" || name == "atom" || name == "red") {
      return CompileMemory(step, name, &words);
    } else if (name == "cvta") {
      return CompileAddress(step, &words);
    } else if (name == "bar" || name == "barrier") {
      CompileBarrier(step, &words);
    } else if (name == "shfl") {
      CompileShuffle(step, &words);
    } else if (name == "fence") {
      step->kind = Kind::kFence;
      step->family = "fence";
      step->beyond = TakeGlobalScope(&words);
      words.Take("sc");
      words.Take("acq_rel");
    } else if (name == "nanosleep") {
      step->kind = Kind::kNothing;
      step->family = "other";
      return Add(*step);
    } else if (name == "mov" &&
               (At(0).kind == Operand::Kind::kGroup || At(1).kind == Operand::Kind::kGroup)) {
      return CompilePack(step, &words);
    } else {
      return CompileArithmetic(step);
    }
    Finish(words);
    Add(*step);
  }
  static void Finish(const Words& words) {
    if (!words.Empty()) throw Unknown();
  }

  void CompileArithmetic(Step* step) {
    const Operation operation = FindOperation(statement_->opcode);
    if (operation.function == nullptr) throw Unknown();
    step->kind = Kind::kLanes;
    step->function = operation.function;
    step->family = operation.family;
    step->mode = operation.mode;
    int* const sources[] = {&step->a, &step->b, &step->c, &step->e};
    for (size_t i = 0; i < operation.sources.size(); ++i)
      *sources[i] = Use(At(i + 1), operation.sources[i]);
    if (statement_->operands.size() != operation.sources.size() + 1) throw Unknown();
    if (At(0).kind != Operand::Kind::kGroup) {
      step->d = Use(At(0), operation.d);
      return Add(*step);
    }
    // setp's p|q: q is the complement.
    step->d = Use(At(0).group.at(0), operation.d);
    Add(*step);
    step->d = Use(At(0).group.at(1), operation.d);
    step->mode |= 4;
    step->family = "none";
    Add(*step);
  }

  void CompilePack(Step* step, Words* words) {
    const std::string type = words->TakeType();
    Finish(*words);
    const bool packs = At(1).kind == Operand::Kind::kGroup;
    const std::vector<Operand>& parts = packs ? At(1).group : At(0).group;
    step->kind = packs ? Kind::kPack : Kind::kUnpack;
    step->family = "move";
    step->lane_bytes = LaneBytes(type);
    step->bytes = BytesOfType(type) / static_cast<int>(parts.size());
    (packs ? step->d : step->a) = Use(At(packs ? 0 : 1), step->lane_bytes);
    for (const Operand& part : parts) {
      const bool nowhere = part.kind == Operand::Kind::kNothing;
      step->values.push_back(nowhere ? -1 : Use(part, step->bytes <= 4 ? 4 : 8));
    }
    Add(*step);
  }

  void CompileAddress(Step* step, Words* words) {
    const bool to = words->Take("to");
    const bool shared = words->Take("shared") || words->Take("shared::cta");
    if (!shared && !words->Take("global")) throw Unknown();
    const uint64_t window = shared ? kSharedWindow : 0;
    if (words->TakeType() != "u64") throw Unknown();
    Finish(*words);
    const Operation add = FindOperation("add.u64");
    step->kind = Kind::kLanes;
    step->family = "move";
    step->function = add.function;
    step->d = Use(At(0), 8);
    step->a = Use(At(1), 8);
    step->b = Constant(to ? -window : window, 8);
    Add(*step);
  }

  // Whether an order holds beyond the block.
  static bool TakeGlobalScope(Words* words) {
    if (words->Take("cta")) return false;
    return words->Take("gpu") || words->Take("gl") || words->Take("sys") || words->Take("cluster");
  }

  void CompileMemory(Step* step, const std::string& name, Words* words) {
    const bool atomic = name == "atom" || name == "red";
    step->kind = name == "ld" ? Kind::kLoad : name == "st" ? Kind::kStore : Kind::kAtomic;
    const std::string type = words->TakeType();
    step->sign = type[0] == 's';
    step->bytes = BytesOfType(type);
    step->lane_bytes = LaneBytes(type);
    // Order. Volatile is a relaxed access of the whole system's scope.
    const bool is_volatile = words->Take("volatile"), relaxed = words->Take("relaxed");
    const bool both = words->Take("acq_rel");
    step->acquire = words->Take("acquire") || both;
    step->release = words->Take("release") || both;
    step->strong = is_volatile || relaxed || step->acquire || step->release || atomic;
    // An atomic without a scope has the GPU's.
    const bool own = statement_->opcode.find(".cta") != std::string::npos;
    step->beyond = TakeGlobalScope(words) || is_volatile || (atomic && !own);
    words->Take("weak");
    step->space = words->Take("global")                                 ? Space::kGlobal
                  : words->Take("shared") || words->Take("shared::cta") ? Space::kShared
                  : words->Take("local")                                ? Space::kLocal
                  : words->Take("param")                                ? Space::kParameter
                                                                        : Space::kGeneric;
    step->constant = words->Take("nc");
    for (const char* hint :
         {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_first", "L1::evict_last",
          "L1::evict_normal", "L1::evict_unchanged", "L1::no_allocate", "L2::evict_first",
          "L2::evict_last", "L2::evict_normal", "L2::64B", "L2::128B", "L2::256B"})
      words->Take(hint);
    int count = 1;
    for (const int vector : {2, 4, 8})
      if (!atomic && words->Take("v" + std::to_string(vector))) count = vector;
    if (atomic) {
      if (!words->Take("add") || type[0] == 'f' || step->bytes < 4) throw Unknown();
    }
    Finish(*words);

    const bool gives = name == "ld" || name == "atom";
    const Operand& address = At(gives ? 1 : 0);
    if (address.kind != Operand::Kind::kAddress) throw Unknown();
    step->offset = static_cast<int64_t>(address.bits);
    if (!address.symbol.empty()) {
      step->offset += AddressOf(address.symbol);
      step->a = -1;
    } else if (address.reg < 0) {
      step->a = -1;
    } else {
      step->base_bytes = lane_bytes_[static_cast<size_t>(address.reg)];
      step->a = at_[static_cast<size_t>(address.reg)];
    }
    const char* const where = step->space == Space::kShared  ? "shared"
                              : step->space == Space::kLocal ? "local"
                                                             : "global";
    step->family = step->space == Space::kParameter ? "move"
                   : atomic                         ? std::string("atomic ") + where
                   : name == "ld"                   ? std::string("load ") + where
                                                    : std::string("store ") + where;
    if (atomic) {
      step->d = gives && At(0).kind != Operand::Kind::kNothing ? Use(At(0), step->lane_bytes) : -1;
      step->values.push_back(Use(At(gives ? 2 : 1), step->lane_bytes));
      return Add(*step);
    }
    const Operand& value = At(gives ? 0 : 1);
    const std::vector<Operand> values =
        value.kind == Operand::Kind::kGroup ? value.group : std::vector<Operand>{value};
    if (static_cast<int>(values.size()) != count) throw Unknown();
    for (const Operand& one : values) {
      if (one.kind == Operand::Kind::kRegister) {  // may be wider than the type
        const int lanes = lane_bytes_[static_cast<size_t>(one.reg)];
        if (lanes == 0 || lanes < step->lane_bytes) throw Unknown();
        step->lane_bytes = lanes;
        step->values.push_back(at_[static_cast<size_t>(one.reg)]);
      } else {
        step->values.push_back(one.kind == Operand::Kind::kNothing ? -1
                                                                   : Use(one, step->lane_bytes));
      }
    }
    Add(*step);
  }

  void CompileBarrier(Step* step, Words* words) {
    step->family = "barrier";
    words->Take("cta");
    if (words->Take("warp")) {
      if (!words->Take("sync")) throw Unknown();
      step->kind = Kind::kWarpBarrier;
      step->a = Use(At(0), 4);
      return;
    }
    if (!words->Take("sync")) throw Unknown();
    words->Take("aligned");
    // Which barrier, and for how many threads, or all.
    for (const Operand& operand : statement_->operands)
      if (operand.kind != Operand::Kind::kConstant) throw Unknown();
    step->kind = Kind::kBarrier;
    step->mode = static_cast<int>(At(0).bits);
    step->target = statement_->operands.size() > 1 ? static_cast<int>(At(1).bits) : 0;
  }

  void CompileShuffle(Step* step, Words* words) {
    step->kind = Kind::kShuffle;
    step->family = "shuffle";
    if (!words->Take("sync")) throw Unknown();
    step->word = words->front();
    words->Take(step->word);
    if (words->TakeType() != "b32") throw Unknown();
    const Operand& result = At(0);
    const bool pair = result.kind == Operand::Kind::kGroup;
    step->d = Use(pair ? result.group.at(0) : result, 4);
    step->target = pair ? Use(result.group.at(1), 0) : -1;
    step->values = {Use(At(1), 4), Use(At(2), 4), Use(At(3), 4)};
    step->a = Use(At(4), 4);  // the lanes that take part
  }

  // The immediate post-dominator of each branch, or -1 where its ways meet at the end only.
  void FindMeetings() {
    const auto count = kernel_.steps.size();
    const auto ends_block = [&](const Step& step) {
      return step.kind == Kind::kBranch || step.kind == Kind::kExit || step.kind == Kind::kTrap;
    };
    std::set<size_t> starting = {0, count};
    for (size_t i = 0; i < count; ++i) {
      const Step& step = kernel_.steps[i];
      if (!ends_block(step)) continue;
      starting.insert(i + 1);
      if (step.kind == Kind::kBranch) starting.insert(static_cast<size_t>(step.target));
    }
    const std::vector<size_t> starts(starting.begin(), starting.end());  // the last is the end
    const size_t blocks = starts.size() - 1;
    const auto block_of = [&](size_t step) {
      return static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), step) -
                                 starts.begin() - 1);
    };
    std::vector<std::vector<size_t>> next(blocks);
    for (size_t b = 0; b < blocks; ++b) {
      const Step& last = kernel_.steps[starts[b + 1] - 1];
      const bool conditional = last.guard >= 0 || !ends_block(last);
      if (conditional) next[b].push_back(b + 1);
      if (last.kind == Kind::kBranch) next[b].push_back(block_of(static_cast<size_t>(last.target)));
      if (next[b].empty() || last.kind == Kind::kExit) next[b].push_back(blocks);
    }
    // Cooper, Harvey and Kennedy's dominators, from the end. In program order of most kernels the
    // successors come later, so that few sweeps suffice.
    std::vector<size_t> order, height(blocks + 1, 0);
    PostOrder(next, blocks, &order);
    for (size_t i = 0; i < order.size(); ++i) height[order[i]] = i;
    constexpr size_t kNone = ~size_t{0};
    std::vector<size_t> above(blocks + 1, kNone);
    above[blocks] = blocks;
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t i = order.size(); i-- > 0;) {
        const size_t b = order[i];
        if (b == blocks) continue;
        size_t meet = kNone;
        for (size_t n : next[b]) {
          if (above[n] == kNone) continue;
          for (size_t m = meet == kNone ? n : meet;;) {
            if (m == n) {
              meet = m;
              break;
            }
            (height[m] < height[n] ? m : n) = above[height[m] < height[n] ? m : n];
          }
        }
        if (meet != above[b]) {
          above[b] = meet;
          changed = true;
        }
      }
    }
    for (size_t b = 0; b < blocks; ++b) {
      Step& last = kernel_.steps[starts[b + 1] - 1];
      if (last.kind == Kind::kBranch && above[b] != kNone && above[b] != blocks)
        last.meet = static_cast<int>(starts[above[b]]);
    }
  }

  // Of the reversed graph, from the end.
  static void PostOrder(const std::vector<std::vector<size_t>>& next, size_t end,
                        std::vector<size_t>* order) {
    std::vector<std::vector<size_t>> before(end + 1);
    for (size_t b = 0; b < end; ++b) {
      for (size_t n : next[b]) before[n].push_back(b);
    }
    std::vector<bool> seen(end + 1);
    std::vector<std::pair<size_t, size_t>> path = {{end, 0}};
    seen[end] = true;
    while (!path.empty()) {
      auto& [block, child] = path.back();
      if (child == before[block].size()) {
        order->push_back(block);
        path.pop_back();
        continue;
      }
      const size_t to = before[block][child++];
      if (seen[to]) continue;
      seen[to] = true;
      path.emplace_back(to, 0);
    }
  }

  Kernel& kernel_;
  const Function& function_;
  const Statement* statement_ = nullptr;
  std::vector<int> at_, lane_bytes_;  // of the registers
  int64_t end_ = 0;
  std::map<std::tuple<uint64_t, int, std::string>, int> constants_;
};

}  // namespace

void Compile(Kernel* kernel) { Compiler(kernel).Run(); }

}  // namespace ptx
}  // namespace cbam_ops
