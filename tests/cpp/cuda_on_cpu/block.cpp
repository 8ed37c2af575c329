#include "block.h"

#include <link.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;

// The thread-local variables of this library: the kernels' __shared__.
struct SharedMemory {
  unsigned char* data = nullptr;
  std::size_t bytes = 0;

  static int find(dl_phdr_info* module, std::size_t, void* found) {
    const auto here = reinterpret_cast<ElfW(Addr)>(&SharedMemory::find);
    SharedMemory segment;
    bool ours = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const ElfW(Phdr) & header = module->dlpi_phdr[i];
      const ElfW(Addr) begin = module->dlpi_addr + header.p_vaddr;
      if (header.p_type == PT_LOAD && begin <= here && here < begin + header.p_memsz) ours = true;
      if (header.p_type == PT_TLS) {
        segment = {static_cast<unsigned char*>(module->dlpi_tls_data), header.p_memsz};
      }
    }
    if (ours) *static_cast<SharedMemory*>(found) = segment;
    return ours;
  }

  static void fill_with_nan() {
    SharedMemory memory;
    dl_iterate_phdr(&SharedMemory::find, &memory);
    if (memory.data != nullptr) std::memset(memory.data, 0xff, memory.bytes);
  }
};

int device_of_the_caller = 0;

bool blocked(Fiber& fiber) {
  if (fiber.barrier != nullptr && fiber.barrier->openings < fiber.opening) return true;
  fiber.barrier = nullptr;
  return false;
}

}  // namespace

void Context::switch_to(Context& next) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&shadow, next.stack, next.bytes);
#endif
  swapcontext(&registers, &next.registers);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(shadow, nullptr, nullptr);
#endif
}

Block& block() {
  static Block only;
  return only;
}

void Block::order_threads(std::uint64_t seed) {
  seed_ = seed;
  random_.seed(seed);
}

void Block::start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
  fiber.barrier = nullptr;
  fiber.done = false;
  fiber.exchanges = 0;
  fiber.context = {};
  fiber.context.stack = fiber.stack.get();
  fiber.context.bytes = kStackBytes;
  getcontext(&fiber.context.registers);
  fiber.context.registers.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.registers.uc_stack.ss_size = kStackBytes;
  fiber.context.registers.uc_link = nullptr;
  makecontext(&fiber.context.registers, &Block::enter, 0);
}

void Block::enter() {
  Block& self = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_.stack, &self.scheduler_.bytes);
#endif
  (*self.body_)();
  self.running_->done = true;
  self.leave();
}

void Block::run(const std::function<void()>& body) {
  SharedMemory::fill_with_nan();
  body_ = &body;
  fibers_.resize(std::max<std::size_t>(fibers_.size(), size.x));
  all_ = Barrier{static_cast<int>(size.x)};
  warps_.assign((size.x + kWarp - 1) / kWarp, Barrier{kWarp});
  for (unsigned i = 0; i < size.x; ++i) start(fibers_[i]);
  std::vector<unsigned> order(warps_.size());
  std::iota(order.begin(), order.end(), 0u);
  for (left_ = size.x; left_ > 0;) {
    if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
    bool ran = false;
    for (const unsigned warp : order) ran = run_warp(warp) || ran;
    if (!ran) throw std::runtime_error("a barrier that not all threads of a block or warp reach");
  }
}

bool Block::run_warp(unsigned warp) {
  std::vector<unsigned> order(std::min<std::size_t>(kWarp, size.x - warp * kWarp));
  std::iota(order.begin(), order.end(), warp * kWarp);
  bool ran = false, goes_on = true;
  while (goes_on) {
    goes_on = false;
    if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
    for (const unsigned i : order) {
      Fiber& fiber = fibers_[i];
      if (fiber.done || blocked(fiber)) continue;
      ran = true;
      goes_on = seed_ != 0;
      thread.x = i;
      running_ = &fiber;
      scheduler_.switch_to(fiber.context);
      if (!failure_.empty()) throw std::runtime_error(std::exchange(failure_, {}));
      if (fiber.done) --left_;
    }
  }
  return ran;
}

void Block::wait_at(Barrier& barrier, int line) {
  if (barrier.waiting == 0) barrier.line = line;
  if (barrier.line != line) fail("threads of a block or warp at different barriers", line);
  if (++barrier.waiting == barrier.members) {
    barrier.waiting = 0;
    ++barrier.openings;
    return;
  }
  running_->barrier = &barrier;
  running_->opening = barrier.openings + 1;
  leave();
}

void Block::fail(const char* what, int line) {
  failure_ = std::string(what) + ", line " + std::to_string(line);
  leave();
}

void run(dim3 grid, dim3 size, const std::function<void()>& body) {
  Block& one = block();
  if (size.x == 0 || size.x > 1024 || size.y != 1 || size.z != 1) {
    throw std::runtime_error("a block of 0 or more than 1024 threads, or more than one dimension");
  }
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z != 1) {
    throw std::runtime_error("a grid outside the limits of the hardware");
  }
  one.size = size;
  one.grid = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      one.index = {x, y, 0};
      one.run(body);
    }
  }
}

int current_device() { return device_of_the_caller; }

bool set_current_device(int device) {
  if (device < 0 || device > 1) return false;
  device_of_the_caller = device;
  return true;
}

}  // namespace cuda_on_cpu
