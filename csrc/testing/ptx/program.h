// PTX text as statements: the part of the language that nvcc emits for kernels without calls.
#ifndef CBAM_OPS_TESTING_PTX_PROGRAM_H_
#define CBAM_OPS_TESTING_PTX_PROGRAM_H_

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace cbam_ops {
namespace ptx {

// What is wrong with a program or with what it did.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A line of the sources; where code was inlined, `parent` is the line that called it.
struct Location {
  std::string file;
  int line = 0;
  std::string function;  // mangled; empty for what is not inlined
  int parent = -1;
};

struct Operand {
  enum class Kind { kNothing, kRegister, kConstant, kSymbol, kAddress, kGroup };
  Kind kind = Kind::kNothing;
  int reg = -1;                // of kRegister; of kAddress the base, or -1
  bool negated = false;        // of a predicate
  uint64_t bits = 0;           // of kConstant; of kAddress the offset
  std::string symbol;          // of kSymbol and of kAddress: a label, variable or parameter
  int scope = 0;               // the braces around it, for labels
  std::vector<Operand> group;  // of kGroup: {a, b} and a|b
};

struct Statement {
  std::string opcode;
  int guard = -1;
  bool guard_negated = false;
  std::vector<Operand> operands;
  int location = -1;
  std::string text;
};

struct Register {
  std::string name;
  int bits;  // 1: a predicate
};

// A variable in shared or local memory, or a parameter.
struct Variable {
  int64_t offset = 0;
  int64_t bytes = 0;  // 0: dynamic shared memory
};

struct Function {
  std::string name;
  std::vector<Register> registers;
  std::vector<Statement> statements;
  std::map<std::string, int> labels;
  std::map<std::string, Variable> shared, local;
  std::map<std::string, Variable> parameters;
  std::vector<Variable> parameter_order;
  int64_t shared_bytes = 0, local_bytes = 0;
  int64_t parameter_bytes = 0;
};

struct Program {
  std::vector<Location> locations;
  // The text of every kernel, by name: parsed when first asked for.
  std::map<std::string, std::string> bodies;
  std::map<std::string, Variable> shared;  // outside of kernels; offsets among themselves
  std::map<std::string, int> known_locations;
  std::map<std::string, std::string> files, strings;
};

Program ParseProgram(const std::string& text);
Function ParseFunction(Program* program, const std::string& name);
// The key of a label in Function::labels.
std::string LabelKey(const std::string& name, int scope);

}  // namespace ptx
}  // namespace cbam_ops

#endif  // CBAM_OPS_TESTING_PTX_PROGRAM_H_
