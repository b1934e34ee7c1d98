#include "testing/ptx/program.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <iomanip>
#include <sstream>
#include <utility>

namespace cbam_ops {
namespace ptx {
namespace {

// The tokens of a text: words (with dots, dollars and %), numbers, and single characters.
class Tokens {
 public:
  explicit Tokens(const std::string& text) : text_(text) { Advance(); }

  const std::string& now() const { return now_; }
  bool ended() const { return now_.empty(); }
  size_t begin() const { return begin_; }

  std::string Take() {
    std::string taken = std::move(now_);
    Advance();
    return taken;
  }
  bool TakeIf(const std::string& word) {
    if (now_ != word) return false;
    Advance();
    return true;
  }
  void Expect(const std::string& word) {
    if (!TakeIf(word)) throw Error("PTX: expected '" + word + "', got '" + now_ + "'");
  }
  int64_t TakeInteger() { return std::strtoll(Take().c_str(), nullptr, 0); }
  void SkipBraces() {  // from after the first
    for (int depth = 1; depth > 0 && !ended();) {
      const std::string word = Take();
      depth += word == "{" ? 1 : word == "}" ? -1 : 0;
    }
  }

 private:
  static bool InWord(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
           c == '.';
  }
  void Advance() {
    for (;;) {
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
      if (text_.compare(at_, 2, "//") == 0) {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (text_.compare(at_, 2, "/*") == 0) {
        at_ = std::min(text_.find("*/", at_) + 2, text_.size());
      } else {
        break;
      }
    }
    begin_ = at_;
    if (at_ == text_.size()) {
      now_.clear();
      return;
    }
    if (text_[at_] == '"') {
      at_ = text_.find('"', at_ + 1) + 1;
    } else if (InWord(text_[at_])) {
      // "::" is part of a modifier (shared::cta), ":" ends a label.
      while (at_ < text_.size() && (InWord(text_[at_]) || text_.compare(at_, 2, "::") == 0 ||
                                    (text_[at_] == ':' && text_[at_ - 1] == ':'))) {
        ++at_;
      }
    } else {
      ++at_;
    }
    now_ = text_.substr(begin_, at_ - begin_);
  }

  const std::string& text_;
  size_t at_ = 0, begin_ = 0;
  std::string now_;
};

int64_t BytesOf(const std::string& type) {
  const size_t digit = type.find_first_of("0123456789");
  if (digit == std::string::npos) throw Error("PTX: no type: " + type);
  return std::atoi(type.c_str() + digit) / 8;
}

int64_t AlignUp(int64_t value, int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// `.align 8 .b8 name[16]`, placed behind what `*end` bytes hold.
std::pair<std::string, Variable> TakeVariable(Tokens* tokens, int64_t* end) {
  int64_t alignment = 1, element = 0;
  while (tokens->now()[0] == '.') {
    const std::string word = tokens->Take();
    if (word == ".align") {
      alignment = tokens->TakeInteger();
    } else if (word != ".ptr" && word != ".global") {
      element = BytesOf(word);
    }
  }
  const std::string name = tokens->Take();
  Variable variable;
  variable.bytes = element;
  if (tokens->TakeIf("[")) {
    variable.bytes = tokens->now() == "]" ? 0 : element * tokens->TakeInteger();
    tokens->Expect("]");
  }
  *end = AlignUp(*end, std::max(alignment, element));
  variable.offset = *end;
  *end += variable.bytes;
  return {name, variable};
}

class FunctionParser {
 public:
  FunctionParser(Program* program, Function* function)
      : program_(program), function_(function), tokens_(program->bodies.at(function->name)) {
    for (const auto& [name, variable] : program->shared) {
      // Those of unknown size start where all others end.
      if (variable.bytes > 0) Place(name, variable);
    }
  }

  void Run() {
    scopes_.emplace_back();
    if (tokens_.TakeIf("(")) {
      while (!tokens_.TakeIf(")")) {
        tokens_.TakeIf(",");
        tokens_.Expect(".param");
        const auto [name, variable] = TakeVariable(&tokens_, &function_->parameter_bytes);
        function_->parameters[name] = variable;
        function_->parameter_order.push_back(variable);
      }
    }
    while (tokens_.now() != "{") tokens_.Take();  // .maxntid and its like
    TakeBlock();
    for (const auto& [name, variable] : program_->shared) {
      if (variable.bytes == 0) {
        function_->shared_bytes = AlignUp(function_->shared_bytes, 128);
        function_->shared[name] = {function_->shared_bytes, 0};
      }
    }
  }

 private:
  void Place(const std::string& name, Variable variable) {
    variable.offset = AlignUp(function_->shared_bytes, 128);
    function_->shared_bytes = variable.offset + variable.bytes;
    function_->shared[name] = variable;
  }

  void TakeBlock() {
    tokens_.Expect("{");
    scopes_.emplace_back();
    const int scope = scope_;
    scope_ = ++scopes_made_;
    while (!tokens_.TakeIf("}")) TakeLine();
    scope_ = scope;
    scopes_.pop_back();
  }

  void TakeLine() {
    const std::string& now = tokens_.now();
    if (now.empty()) throw Error("PTX: " + function_->name + " has no end");
    if (now == "{") return TakeBlock();
    if (tokens_.TakeIf(";")) return;
    if (now == ".reg") return TakeRegisters();
    if (now == ".loc") return TakeLocation();
    if (now == ".pragma") {
      while (!tokens_.TakeIf(";")) tokens_.Take();
      return;
    }
    if (tokens_.TakeIf(".shared")) {
      const auto [name, variable] = TakeVariable(&tokens_, &function_->shared_bytes);
      function_->shared[name] = variable;
      return tokens_.Expect(";");
    }
    if (tokens_.TakeIf(".local")) {
      const auto [name, variable] = TakeVariable(&tokens_, &function_->local_bytes);
      function_->local[name] = variable;
      return tokens_.Expect(";");
    }
    TakeStatement();
  }

  void TakeRegisters() {
    tokens_.Take();
    const std::string type = tokens_.Take();
    const int bits = type == ".pred" ? 1 : static_cast<int>(8 * BytesOf(type));
    while (!tokens_.TakeIf(";")) {
      tokens_.TakeIf(",");
      const std::string name = tokens_.Take();
      if (tokens_.TakeIf("<")) {
        const int64_t count = tokens_.TakeInteger();
        tokens_.Expect(">");
        for (int64_t i = 0; i < count; ++i) Declare(name + std::to_string(i), bits);
      } else {
        Declare(name, bits);
      }
    }
  }
  void Declare(const std::string& name, int bits) {
    scopes_.back()[name] = static_cast<int>(function_->registers.size());
    function_->registers.push_back({name, bits});
  }

  // .loc file line column [, function_name string[+n], inlined_at file line column]
  void TakeLocation() {
    tokens_.Take();
    const auto take_key = [this](Location* location) {
      const std::string file = tokens_.Take();
      location->file = program_->files[file];
      location->line = static_cast<int>(tokens_.TakeInteger());
      return file + " " + std::to_string(location->line) + " " + tokens_.Take();
    };
    Location location;
    const std::string key = take_key(&location);
    std::string whole = key;
    while (tokens_.TakeIf(",")) {
      if (tokens_.TakeIf("function_name")) {
        const std::string name = tokens_.Take();
        location.function = program_->strings[name];
        if (tokens_.TakeIf("+")) tokens_.Take();
        whole += name;
      } else {
        tokens_.Expect("inlined_at");
        Location parent;
        const std::string parent_key = take_key(&parent);
        const auto found = last_location_.find(parent_key);
        location.parent = found == last_location_.end() ? -1 : found->second;
        whole += " " + std::to_string(location.parent);
      }
    }
    const auto [known, is_new] =
        program_->known_locations.emplace(function_->name + whole, program_->locations.size());
    if (is_new) program_->locations.push_back(location);
    location_ = last_location_[key] = known->second;
  }

  int Find(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    return -1;
  }

  void TakeStatement() {
    const size_t begin = tokens_.begin();
    Statement statement;
    statement.location = location_;
    if (tokens_.TakeIf("@")) {
      statement.guard_negated = tokens_.TakeIf("!");
      statement.guard = Find(tokens_.Take());
    }
    statement.opcode = tokens_.Take();
    if (tokens_.TakeIf(":")) {
      function_->labels[LabelKey(statement.opcode, scope_)] =
          static_cast<int>(function_->statements.size());
      return;
    }
    while (tokens_.now() != ";") {
      statement.operands.push_back(TakeOperand());
      tokens_.TakeIf(",");
    }
    const std::string& body = program_->bodies.at(function_->name);
    statement.text = body.substr(begin, tokens_.begin() - begin);
    std::replace_if(
        statement.text.begin(), statement.text.end(), [](char c) { return c == '\t'; }, ' ');
    tokens_.Take();
    function_->statements.push_back(std::move(statement));
  }

  Operand TakeOperand() {
    Operand first = TakePart();
    if (!tokens_.TakeIf("|")) return first;
    Operand pair;
    pair.kind = Operand::Kind::kGroup;
    pair.group = {std::move(first), TakePart()};
    return pair;
  }

  Operand TakePart() {
    Operand operand;
    if (tokens_.TakeIf("{")) {
      operand.kind = Operand::Kind::kGroup;
      while (!tokens_.TakeIf("}")) {
        operand.group.push_back(TakePart());
        tokens_.TakeIf(",");
      }
      return operand;
    }
    if (tokens_.TakeIf("[")) {
      operand = TakePart();
      const bool is_constant = operand.kind == Operand::Kind::kConstant;
      operand.kind = Operand::Kind::kAddress;
      if (is_constant) operand.reg = -1;
      while (!tokens_.TakeIf("]")) {
        const bool minus = tokens_.now() == "-";
        tokens_.Take();
        const uint64_t offset = TakePart().bits;
        operand.bits += minus ? -offset : offset;
      }
      return operand;
    }
    operand.negated = tokens_.TakeIf("!");
    const bool minus = tokens_.TakeIf("-");
    const std::string word = tokens_.Take();
    if (std::isdigit(static_cast<unsigned char>(word[0]))) {
      operand.kind = Operand::Kind::kConstant;
      const bool is_float = word[0] == '0' && word.size() > 2 &&
                            (word[1] == 'f' || word[1] == 'F' || word[1] == 'd' || word[1] == 'D');
      operand.bits = std::strtoull(word.c_str() + (is_float ? 2 : 0), nullptr, is_float ? 16 : 0);
      if (minus) operand.bits = -operand.bits;
      return operand;
    }
    operand.reg = Find(word);
    if (operand.reg >= 0) {
      operand.kind = Operand::Kind::kRegister;
    } else if (word != "_") {
      operand.kind = Operand::Kind::kSymbol;
      operand.symbol = word;
      operand.scope = scope_;
    }
    return operand;
  }

  Program* const program_;
  Function* const function_;
  Tokens tokens_;
  std::vector<std::map<std::string, int>> scopes_;
  int scope_ = 0, scopes_made_ = 0;
  int location_ = -1;
  std::map<std::string, int> last_location_;
};

}  // namespace

Program ParseProgram(const std::string& text) {
  Program program;
  // Lines of the debug sections first, since the kernels refer to what stands at the end.
  std::istringstream lines(text);
  std::string string_name;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string word;
    if (!(words >> word)) continue;
    if (word == ".file") {
      std::string number, name;
      words >> number >> std::quoted(name);
      program.files[number] = name.substr(0, name.find('"'));
    } else if (word.rfind("$L__info_string", 0) == 0 && word.back() == ':') {
      string_name = word.substr(0, word.size() - 1);
    } else if (word == ".b8" && !string_name.empty()) {
      std::string number;
      while (std::getline(words, number, ',')) {
        const int c = std::atoi(number.c_str());
        if (c != 0) {
          program.strings[string_name] += static_cast<char>(c);
        } else {
          string_name.clear();
          break;
        }
      }
    } else {
      string_name.clear();
    }
  }
  Tokens tokens(text);
  int64_t shared_end = 0;
  while (!tokens.ended()) {
    const std::string word = tokens.Take();
    if (word == ".entry") {
      const std::string name = tokens.Take();
      const size_t begin = tokens.begin();
      while (tokens.Take() != "{") continue;
      tokens.SkipBraces();
      program.bodies[name] = text.substr(begin, tokens.begin() - begin);
    } else if (word == ".shared") {
      const auto [name, variable] = TakeVariable(&tokens, &shared_end);
      program.shared[name] = variable;
    } else if (word == ".section") {
      while (tokens.Take() != "{") continue;
      tokens.SkipBraces();
    }
  }
  return program;
}

// Labels belong to their braces; nvcc's own are found from everywhere.
std::string LabelKey(const std::string& name, int scope) {
  return name[0] == '$' ? name : name + "@" + std::to_string(scope);
}

Function ParseFunction(Program* program, const std::string& name) {
  Function function;
  function.name = name;
  FunctionParser(program, &function).Run();
  return function;
}

}  // namespace ptx
}  // namespace cbam_ops
