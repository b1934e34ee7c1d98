// What PTX's instructions on registers compute, for the 32 lanes of a warp at a time.
//
// A register is an array of 32 lanes of 4 bytes (types up to 32 bits, in the lower bits) or of
// 8 bytes; a predicate is one 32-bit mask. Approximate functions (ex2, rcp, ...) give the
// number nearest to the exact result, which is within the error that PTX documents for them.
#ifndef CBAM_OPS_TESTING_PTX_ARITHMETIC_H_
#define CBAM_OPS_TESTING_PTX_ARITHMETIC_H_

#include <cstdint>
#include <string>
#include <vector>

namespace cbam_ops {
namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Lanes {
  char* d;
  const char* a;
  const char* b;
  const char* c;
  const char* e;
  uint32_t mask;
  int mode;
};
using LaneFunction = void (*)(const Lanes&);

struct Operation {
  LaneFunction function = nullptr;
  const char* family = "";   // what it is counted as
  int d = 0;                 // bytes of the destination's lanes; 0 is a predicate
  std::vector<int> sources;  // likewise
  int mode = 0;
};

// The opcode split at its dots, from which its meaning is taken word by word; what is left at the
// end was not understood.
class Words {
 public:
  explicit Words(const std::string& opcode);
  bool Take(const std::string& word);
  // The last word that is a type, or "".
  std::string TakeType();
  bool Empty() const { return words_.empty(); }
  std::string front() const { return words_.empty() ? "" : words_.front(); }

 private:
  std::vector<std::string> words_;
};

// Bytes of a type in memory; 0 of "pred".
int BytesOfType(const std::string& type);
// Bytes of a type's lanes in a register.
int LaneBytes(const std::string& type);

// An operation with a null function where the opcode is unknown.
Operation FindOperation(const std::string& opcode);

}  // namespace ptx
}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_PTX_ARITHMETIC_H_
