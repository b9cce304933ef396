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

enum class State { ready, at_barrier, in_exchange, at_grid_barrier, done };
// Of a block that cannot go on by itself.
enum class Stop { done, at_grid_barrier };

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes;
  int group;
};
constexpr int kCopyBytes = 16;

struct Fiber {
  Context context;
  Thread thread;
  State state = State::ready;
  std::source_location where;
  std::vector<Copy> copies;
  int groups = 0;  // of copies, committed so far
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

  void check_shared(const unsigned char* address, const char* what) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at % kCopyBytes != 0) fail(std::string(what) + " at an address that is no multiple of 16");
    if (address < data_ || address + kCopyBytes > data_ + data_bytes_)
      fail(std::string(what) + " outside of shared memory");
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
        if (fibers_[i].state != State::ready) continue;
        resume(fibers_[i]);
        any = true;
      }
    }
    if (error_) return abandon();
    return any || open_barrier();
  }
  bool run_ready(size_t begin, size_t end) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
      if (fibers_[i].state != State::ready) continue;
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
