#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarp = 32;
constexpr int64_t kFenceBytes = 256;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type

std::atomic<Schedule> schedule_in_use{Schedule::forward};

[[noreturn]] void fail(const std::string& what) {
  throw std::logic_error("simt: " + what);
}
std::string describe(const std::source_location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

// ---- fibers: a stack and the registers a call must keep -----------------------------------------------------------

#if defined(__x86_64__)
extern "C" void simt_switch(void** from, void* to);
__asm__(
    ".text\n.globl simt_switch\n.hidden simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size simt_switch,.-simt_switch\n");

struct Context {
  void* stack_pointer = nullptr;
  void prepare(unsigned char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;                         // the entry never returns; keeps its stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);  // where the switch returns to
    stack_pointer = top - 6;                  // six registers of no meaning
  }
  static void change(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t registers;
  void prepare(unsigned char* stack, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack;
    registers.uc_stack.ss_size = kStackBytes;
    registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
};
#endif

// ---- a block -------------------------------------------------------------------------------------------------------

enum class State { ready, at_barrier, in_exchange, at_grid_barrier, at_message_barrier, done };
// Of a block that cannot go on by itself.
enum class Stop { done, at_grid_barrier };

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes;
  int group;
};
constexpr int kCopyBytes = 16;

// Eight bytes of shared memory.
struct MessageBarrier {
  int32_t bytes;  // expected and not there yet
  uint8_t arrivals, pending, parity, mark;
  static constexpr uint8_t kMark = 0x5a;

  void finish_phase() {
    if (pending != 0 || bytes != 0) return;
    pending = arrivals;
    parity ^= 1;
  }
};
static_assert(sizeof(MessageBarrier) == 8);

struct BoxCopy {
  unsigned char* shared;
  BoxMap map;
  int64_t line, along;
  MessageBarrier* barrier;
};
constexpr int kBoxLineBytes = 128, kBoxAlignment = 1024;

// The hardware's 128-byte swizzle, on addresses of shared memory.
uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

struct BoxProduct {
  float* sums;
  uint64_t left, right;
  bool left_along_depth, right_along_depth;
  float (*value)(uint16_t);
  int batch;
  std::vector<float> before;  // of the sums, where no earlier product of them is under way
};

struct Fiber {
  Context context;
  Thread thread;
  State state = State::ready;
  std::source_location where;
  std::vector<Copy> copies;
  int groups = 0;  // of copies, committed so far
  std::vector<BoxProduct> products;
  int batches = 0;                          // of products, committed so far
  const MessageBarrier* barrier = nullptr;  // that it waits for, in a state of that name
  unsigned parity = 0;
};

// The lanes of a warp leave their values in one of two sets of slots in turn: who still reads the last exchange reads
// the other set.
struct Warp {
  alignas(16) unsigned char slots[2][kWarp][kLaneBytes];
  uint64_t exchanges = 0;
  unsigned arrived = 0;
};

struct Stacks {
  std::vector<unsigned char*> free;
  ~Stacks() {
    for (unsigned char* stack : free) munmap(stack, kStackBytes);
  }
  unsigned char* take() {
    if (!free.empty()) {
      unsigned char* stack = free.back();
      free.pop_back();
      return stack;
    }
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(stack);
  }
};

class Block;
thread_local Stacks stacks;
thread_local Block* running_block = nullptr;
thread_local Fiber* running = nullptr;

class Block {
 public:
  Block(const LaunchShape& shape, const std::function<void()>& body, Schedule schedule, uint64_t seed)
      : body_(body), schedule_(schedule), random_(seed), shared_(shape.shared_bytes + 2 * kFenceBytes + 64, kPoison) {
    const size_t count = size_t{shape.threads.x} * shape.threads.y * shape.threads.z;
    if (count == 0 || count > 1024) fail(std::to_string(count) + " threads in a block, expected 1 to 1024");
    if (count % kWarp != 0) fail(std::to_string(count) + " threads in a block, expected whole warps");
    fibers_.resize(count);
    warps_.resize(count / kWarp);
    const auto address = reinterpret_cast<uintptr_t>(shared_.data()) + kFenceBytes;
    data_ = reinterpret_cast<unsigned char*>((address + 63) / 64 * 64);
    data_bytes_ = shape.shared_bytes;
  }
  ~Block() {
    for (unsigned char* stack : stacks_) stacks.free.push_back(stack);
  }

  void start(const LaunchShape& shape, Index block) {
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.thread = {{static_cast<unsigned>(i), 0, 0}, block, shape.threads, shape.blocks, data_};
      stacks_.push_back(stacks.take());
      fiber.context.prepare(stacks_.back(), &Block::enter);
    }
  }

  // Runs as far as the block comes without the others of its grid.
  Stop advance() {
    for (Fiber& fiber : fibers_) {
      if (fiber.state == State::at_grid_barrier) fiber.state = State::ready;
    }
    running_block = this;
    while (step()) {
    }
    running_block = nullptr;
    if (error_) std::rethrow_exception(error_);
    if (fibers_[0].state == State::at_grid_barrier) return Stop::at_grid_barrier;
    check_nothing_is_under_way();
    check_fence();
    return Stop::done;
  }
  void leave() {
    running_block = this;
    blame("another block of the grid has failed");
    running_block = nullptr;
  }

  void wait(State state, std::source_location where) {
    Fiber& fiber = *running;
    fiber.state = state;
    fiber.where = where;
    Context::change(fiber.context, scheduler_);
    if (error_) throw Abandoned();
  }

  const unsigned char* exchange(const void* mine, size_t bytes, std::source_location where) {
    const unsigned index = running->thread.thread.x;
    Warp& warp = warps_[index / kWarp];
    unsigned char (&slots)[kWarp][kLaneBytes] = warp.slots[warp.exchanges % 2];
    std::memcpy(slots[index % kWarp], mine, bytes);
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      ++warp.exchanges;
      for (unsigned i = index / kWarp * kWarp; i < index / kWarp * kWarp + kWarp; ++i) {
        Fiber& other = fibers_[i];
        if (other.state != State::in_exchange) continue;
        if (other.where.line() != where.line()) {
          fail("lanes of a warp exchange at " + describe(where) + " and at " + describe(other.where));
        }
        other.state = State::ready;
      }
    } else {
      wait(State::in_exchange, where);
    }
    return slots[0];
  }

  void check_shared(const unsigned char* address, const char* what, int64_t bytes = kCopyBytes,
                    int alignment = kCopyBytes) const {
    if ((address - data_) % alignment != 0)
      fail(std::string(what) + " at an address that is no multiple of " + std::to_string(alignment));
    if (address < data_ || address + bytes > data_ + data_bytes_) fail(std::string(what) + " outside of shared memory");
  }

  MessageBarrier& barrier_at(void* address) const {
    auto* bytes = static_cast<unsigned char*>(address);
    check_shared(bytes, "a barrier", sizeof(MessageBarrier), sizeof(MessageBarrier));
    return *reinterpret_cast<MessageBarrier*>(bytes);
  }
  MessageBarrier& initialized_barrier_at(void* address) const {
    MessageBarrier& barrier = barrier_at(address);
    if (barrier.mark != MessageBarrier::kMark) fail("a barrier is used that was not initialized");
    return barrier;
  }
  void wait_for_phase(void* address, unsigned parity, std::source_location where) {
    running->barrier = &initialized_barrier_at(address);
    running->parity = parity;
    while (running->barrier->parity == parity) wait(State::at_message_barrier, where);
  }

  void copy_later(const BoxCopy& copy) {
    const int64_t bytes = int64_t{copy.map.box_lines} * kBoxLineBytes;
    check_shared(copy.shared, "a box", bytes, kBoxAlignment);
    std::memset(copy.shared, kPoison, static_cast<size_t>(bytes));
    boxes_.push_back(copy);
  }

  const unsigned char* shared_at(uint32_t address) const {
    check_shared(data_ + address, "an operand", 2, 2);
    return data_ + address;
  }

 private:
  struct Abandoned {};

  static void enter() {
    Block* block = running_block;
    try {
      block->body_();
    } catch (const Abandoned&) {
    } catch (...) {
      if (!block->error_) block->error_ = std::current_exception();
    }
    running->state = State::done;
    Context unused;
    Context::change(unused, block->scheduler_);
  }

  void resume(Fiber& fiber) {
    running = &fiber;
    Context::change(scheduler_, fiber.context);
    running = nullptr;
  }

  // Lets every thread that can run do so once, in the schedule's order; false when all are done.
  bool step() {
    std::vector<size_t> order(fibers_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = schedule_ == Schedule::reverse ? order.size() - 1 - i : i;
    if (schedule_ == Schedule::random) std::shuffle(order.begin(), order.end(), random_);
    bool any = false;
    if (schedule_ == Schedule::warp_ahead) {
      const size_t first = random_() % warps_.size();
      for (size_t w = 0; w < warps_.size(); ++w) {
        const size_t begin = (first + w) % warps_.size() * kWarp;
        while (run_ready(begin, begin + kWarp)) any = true;
      }
    } else {
      for (size_t i : order) {
        if (!can_run(fibers_[i])) continue;
        resume(fibers_[i]);
        any = true;
      }
    }
    if (error_) return abandon();
    return any || deliver_box() || open_barrier();
  }

  // One of the copies that are under way, in the order in which they were ordered or in any; none while nobody waits.
  bool deliver_box() {
    const auto waits = [](const Fiber& fiber) { return fiber.state == State::at_message_barrier; };
    if (boxes_.empty() || std::none_of(fibers_.begin(), fibers_.end(), waits)) return false;
    const size_t chosen = schedule_ == Schedule::random ? random_() % boxes_.size() : 0;
    const BoxCopy copy = boxes_[chosen];
    boxes_.erase(boxes_.begin() + static_cast<int64_t>(chosen));
    const auto begin = static_cast<uint32_t>(copy.shared - data_);
    for (int line = 0; line < copy.map.box_lines; ++line) {
      for (int i = 0; i < kBoxLineBytes / 2; ++i) {
        const int64_t from_line = copy.line + line, along = copy.along + i;
        uint16_t number = 0;
        if (from_line >= 0 && from_line < copy.map.lines && along >= 0 && along < copy.map.length) {
          const auto* from = static_cast<const unsigned char*>(copy.map.data) + from_line * copy.map.stride_bytes;
          std::memcpy(&number, from + along * 2, 2);
        }
        std::memcpy(data_ + swizzled(begin + static_cast<uint32_t>(line * kBoxLineBytes + i * 2)), &number, 2);
      }
    }
    copy.barrier->bytes -= copy.map.box_lines * kBoxLineBytes;
    copy.barrier->finish_phase();
    return true;
  }

  static bool can_run(Fiber& fiber) {
    if (fiber.state == State::at_message_barrier && fiber.barrier->parity != fiber.parity) fiber.state = State::ready;
    return fiber.state == State::ready;
  }
  bool run_ready(size_t begin, size_t end) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
      if (!can_run(fibers_[i])) continue;
      resume(fibers_[i]);
      any = true;
    }
    return any && !error_;
  }

  // Nobody can run: either all have come to the same barrier, or all are done, or the kernel is wrong.
  bool open_barrier() {
    const Fiber* waiting = nullptr;
    size_t done = 0;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == State::done) ++done;
      if (fiber.state == State::in_exchange) return blame("a lane waits for its warp at " + describe(fiber.where));
      if (fiber.state == State::at_message_barrier)
        return blame("a thread waits for a phase that nobody ends at " + describe(fiber.where));
      if (fiber.state != State::done && waiting == nullptr) waiting = &fiber;
    }
    if (waiting == nullptr) return false;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == State::done) {
        return blame(std::to_string(done) + " threads ended while others wait at " + describe(waiting->where));
      }
      if (fiber.state != waiting->state || fiber.where.line() != waiting->where.line()) {
        return blame("threads wait at " + describe(waiting->where) + " and at " + describe(fiber.where));
      }
    }
    if (waiting->state == State::at_grid_barrier) return false;
    for (Fiber& fiber : fibers_) fiber.state = State::ready;
    return true;
  }
  bool blame(const std::string& what) {
    error_ = std::make_exception_ptr(std::logic_error("simt: " + what));
    return abandon();
  }
  // Unwinds the stacks of those that still wait.
  bool abandon() {
    for (Fiber& fiber : fibers_) {
      if (fiber.state != State::done) resume(fiber);
    }
    return false;
  }

  void check_nothing_is_under_way() const {
    const bool products =
        std::any_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return !f.products.empty(); });
    if (!boxes_.empty() || products) fail("a block ended while copies or products were under way");
  }

  void check_fence() const {
    const auto is_poison = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(shared_.data(), const_cast<const unsigned char*>(data_), is_poison) ||
        !std::all_of(const_cast<const unsigned char*>(data_ + data_bytes_), shared_.data() + shared_.size(),
                     is_poison)) {
      fail("a kernel wrote outside its " + std::to_string(data_bytes_) + " bytes of shared memory");
    }
  }

  const std::function<void()>& body_;
  Schedule schedule_;
  std::mt19937_64 random_;
  std::vector<unsigned char> shared_;
  unsigned char* data_;
  int64_t data_bytes_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned char*> stacks_;
  std::vector<BoxCopy> boxes_;
  Context scheduler_;
  std::exception_ptr error_;
};

}  // namespace

const Thread& current() {
  return running->thread;
}

void set_schedule(Schedule schedule) {
  schedule_in_use = schedule;
}

void synchronize_block(std::source_location where) {
  running_block->wait(State::at_barrier, where);
}

const unsigned char* exchange(const void* mine, size_t bytes, std::source_location where) {
  return running_block->exchange(mine, bytes, where);
}

void load_matrices(uint32_t (&words)[4], const void* row, bool transposed, std::source_location where) {
  running_block->check_shared(static_cast<const unsigned char*>(row), "a matrix");
  const Given<const unsigned char*> rows(static_cast<const unsigned char*>(row), where);
  for (int m = 0; m < 4; ++m) {
    if (!transposed) {
      std::memcpy(&words[m], rows[m * 8 + lane() / 4] + lane() % 4 * 4, 4);
      continue;
    }
    uint16_t halves[2];
    for (int i = 0; i < 2; ++i) std::memcpy(&halves[i], rows[m * 8 + lane() % 4 * 2 + i] + lane() / 4 * 2, 2);
    std::memcpy(&words[m], halves, 4);
  }
}

void copy_later(void* shared, const void* global, int bytes) {
  auto* to = static_cast<unsigned char*>(shared);
  running_block->check_shared(to, "a copy");
  if (reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0) fail("a copy from an address that is no multiple of 16");
  std::memset(to, kPoison, kCopyBytes);
  running->copies.push_back({to, static_cast<const unsigned char*>(global), bytes, running->groups});
}

void commit_copies() {
  ++running->groups;
}

void wait_for_copies(int but_for_groups) {
  std::erase_if(running->copies, [&](const Copy& copy) {
    if (copy.group >= running->groups - but_for_groups) return false;
    std::memset(copy.shared, 0, kCopyBytes);
    std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    return true;
  });
}

// ---- what Hopper adds ----------------------------------------------------------------------------------------------

namespace {
std::atomic<bool> hopper_in_use{false};

// Of 16-bit numbers in boxes; see BoxOperand.
class Operand {
 public:
  Operand(uint64_t descriptor, bool along_depth) : along_depth_(along_depth) {
    const auto field = [&](int first) { return static_cast<uint32_t>(descriptor >> first & 0x3fff) << 4; };
    begin_ = field(0), box_bytes_ = field(16), eight_lines_bytes_ = field(32);
    if (descriptor >> 62 != 1) fail("an operand without the swizzle of 128 bytes");
  }
  uint16_t operator()(int row, int k) const {
    const auto r = static_cast<uint32_t>(row), d = static_cast<uint32_t>(k);
    const uint32_t line = along_depth_ ? r : d, along = along_depth_ ? d : r % 64;
    const uint32_t box = along_depth_ ? 0 : r / 64 * box_bytes_;
    const uint32_t address = begin_ + box + line / 8 * eight_lines_bytes_ + line % 8 * kBoxLineBytes + along * 2;
    uint16_t number;
    std::memcpy(&number, running_block->shared_at(swizzled(address)), 2);
    return number;
  }

 private:
  bool along_depth_;
  uint32_t begin_, box_bytes_, eight_lines_bytes_;
};

void execute(const BoxProduct& product) {
  constexpr int kDepth = 16;
  const int thread = static_cast<int>(current().thread.x % 128), row = thread / 32 * 16 + thread % 32 / 4;
  const Operand left(product.left, product.left_along_depth), right(product.right, product.right_along_depth);
  double rows[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < kDepth; ++k) rows[half][k] = product.value(left(row + half * 8, k));
  }
  for (int i = 0; i < 64; i += 4) {
    for (int c = 0; c < 2; ++c) {
      double sums[2] = {0, 0};
      for (int k = 0; k < kDepth; ++k) {
        const double number = product.value(right(i * 2 + thread % 4 * 2 + c, k));
        sums[0] += rows[0][k] * number, sums[1] += rows[1][k] * number;
      }
      for (int half = 0; half < 2; ++half) {
        float& sum = product.sums[i + half * 2 + c];
        sum = add_rounded_towards_zero(sum, sums[half]);
      }
    }
  }
}
}  // namespace

bool uses_hopper() {
  return hopper_in_use;
}
void use_hopper(bool wanted) {
  hopper_in_use = wanted;
}

void initialize_barrier(void* barrier, int arrivals) {
  if (arrivals < 1 || arrivals > 255) fail("a barrier for " + std::to_string(arrivals) + " arrivals");
  const auto count = static_cast<uint8_t>(arrivals);
  running_block->barrier_at(barrier) = {0, count, count, 0, MessageBarrier::kMark};
}

void arrive(void* barrier, int expected_bytes) {
  MessageBarrier& state = running_block->initialized_barrier_at(barrier);
  if (state.pending == 0) fail("more arrivals at a barrier than it was made for");
  state.bytes += expected_bytes;
  --state.pending;
  state.finish_phase();
}

void wait_for_phase(void* barrier, unsigned parity, std::source_location where) {
  running_block->wait_for_phase(barrier, parity, where);
}

void copy_box(void* shared, const BoxMap& map, int64_t line, int64_t along, void* barrier) {
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0 || map.stride_bytes % 16 != 0)
    fail("boxes of a matrix whose lines begin at no multiples of 16 bytes");
  running_block->copy_later(
      {static_cast<unsigned char*>(shared), map, line, along, &running_block->initialized_barrier_at(barrier)});
}

void multiply_boxes(float (&sums)[64], uint64_t left, uint64_t right, bool left_along_depth, bool right_along_depth,
                    float (*value)(uint16_t)) {
  BoxProduct product = {sums, left, right, left_along_depth, right_along_depth, value, running->batches, {}};
  const auto of_same_sums = [&](const BoxProduct& other) { return other.sums == sums; };
  if (std::none_of(running->products.begin(), running->products.end(), of_same_sums)) {
    product.before.assign(sums, sums + 64);
    std::fill(sums, sums + 64, NAN);
  }
  running->products.push_back(std::move(product));
}

void commit_products() {
  ++running->batches;
}

void wait_for_products(int but_for_batches) {
  std::erase_if(running->products, [&](const BoxProduct& product) {
    if (product.batch >= running->batches - but_for_batches) return false;
    if (!product.before.empty()) std::copy(product.before.begin(), product.before.end(), product.sums);
    execute(product);
    return true;
  });
  // Those that remain begin from sums that are not theirs to show yet.
  std::vector<float*> hidden;
  for (BoxProduct& product : running->products) {
    if (std::find(hidden.begin(), hidden.end(), product.sums) != hidden.end()) continue;
    hidden.push_back(product.sums);
    if (product.before.empty()) {
      product.before.assign(product.sums, product.sums + 64);
      std::fill(product.sums, product.sums + 64, NAN);
    }
  }
}

void synchronize_grid(std::source_location where) {
  running_block->wait(State::at_grid_barrier, where);
}

namespace {

// The blocks of a grid in the order in which they run.
std::vector<Index> blocks_of(const LaunchShape& shape, Schedule schedule) {
  std::vector<Index> blocks;
  for (unsigned z = 0; z < shape.blocks.z; ++z) {
    for (unsigned y = 0; y < shape.blocks.y; ++y) {
      for (unsigned x = 0; x < shape.blocks.x; ++x) blocks.push_back({x, y, z});
    }
  }
  std::mt19937_64 random(blocks.size());
  if (schedule == Schedule::reverse) std::reverse(blocks.begin(), blocks.end());
  if (schedule == Schedule::random) std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

}  // namespace

void run(const LaunchShape& shape, const std::function<void()>& body) {
  const Schedule schedule = schedule_in_use;
  std::mt19937_64 random(shape.blocks.x);
  for (const Index& index : blocks_of(shape, schedule)) {
    Block block(shape, body, schedule, random());
    block.start(shape, index);
    if (block.advance() != Stop::done) {
      block.leave();
      fail("a block waits for the others of a grid whose blocks do not run together");
    }
  }
}

void run_together(const LaunchShape& shape, const std::function<void()>& body) {
  const Schedule schedule = schedule_in_use;
  std::mt19937_64 random(shape.blocks.x);
  std::vector<std::unique_ptr<Block>> blocks;
  for (const Index& index : blocks_of(shape, schedule)) {
    blocks.push_back(std::make_unique<Block>(shape, body, schedule, random()));
    blocks.back()->start(shape, index);
  }
  size_t next = 0;
  try {
    for (bool any = !blocks.empty(); any;) {
      size_t waiting = 0;
      for (next = 0; next < blocks.size(); ++next) waiting += blocks[next]->advance() == Stop::at_grid_barrier ? 1 : 0;
      if (waiting != 0 && waiting != blocks.size()) fail("some blocks ended while others wait for the grid");
      any = waiting != 0;
    }
  } catch (...) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (i != next) blocks[i]->leave();
    }
    throw;
  }
}

}  // namespace simt

// For tests, which have no other way into an extension.
extern "C" __attribute__((visibility("default"))) void simt_set_schedule(int schedule) {
  simt::set_schedule(static_cast<simt::Schedule>(schedule));
}
extern "C" __attribute__((visibility("default"))) void simt_use_hopper(int wanted) {
  simt::use_hopper(wanted != 0);
}
