// A block of threads as fibers on one CPU thread; see cuda_runtime.h.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace cuda_on_cpu {

constexpr int kWarp = 32;

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Registers and stack of a fiber, or of the scheduler.
struct Context {
  ucontext_t registers;
  const void* stack = nullptr;
  std::size_t bytes = 0;
  void* shadow = nullptr;  // AddressSanitizer's

  void switch_to(Context& next);
};

// Where threads wait for `members` of them; the last to come opens it.
struct Barrier {
  int members = 0, waiting = 0, line = 0;
  std::uint64_t openings = 0;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  Barrier* barrier = nullptr;  // null: can run
  std::uint64_t opening = 0;   // of that barrier, that this fiber waits for
  bool done = false;
  std::uint64_t exchanges = 0;
  unsigned char value[2][8];  // of the last two shuffles: a lane may be one ahead
};

class Block {
 public:
  uint3 thread, index;
  dim3 size, grid;

  // Runs body() once as each thread of the block `index`.
  void run(const std::function<void()>& body);

  // 0: threads run in their order, a step each. Otherwise the order is drawn anew between barriers,
  // and a warp runs until it is done or waits for another one.
  void order_threads(std::uint64_t seed);

  // Return when every thread of the block, or of the warp, has called them from that line.
  void wait(int line) { wait_at(all_, line); }

  template <typename T>
  T shuffle(unsigned mask, T value, int from_lane, int line) {
    static_assert(sizeof(T) <= sizeof Fiber::value[0]);
    if (mask != 0xffffffffu) fail("a shuffle among some lanes only", line);
    const std::size_t warp = thread.x / kWarp;
    const std::size_t slot = running_->exchanges++ % 2;
    std::memcpy(running_->value[slot], &value, sizeof(T));
    wait_at(warps_[warp], line);
    const std::size_t from = warp * kWarp + static_cast<std::size_t>(from_lane);
    std::memcpy(&value, fibers_[from].value[slot], sizeof(T));
    return value;
  }

 private:
  static void enter();
  void start(Fiber& fiber);
  bool run_warp(unsigned warp);  // false: none of its threads can
  void wait_at(Barrier& barrier, int line);
  void fail(const char* what, int line);
  void leave() { running_->context.switch_to(scheduler_); }

  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> warps_;
  Barrier all_;
  Context scheduler_;
  Fiber* running_ = nullptr;
  std::size_t left_ = 0;  // fibers that are not done
  std::string failure_;
  std::uint64_t seed_ = 0;
  std::mt19937_64 random_;
};

Block& block();

// Every block of the grid, one after another. Throws std::runtime_error for a grid that the
// hardware would refuse and for barriers that would hang it.
void run(dim3 grid, dim3 size, const std::function<void()>& body);

// Two devices, so that a caller's current one can differ from its tensors'. False: no such device.
int current_device();
bool set_current_device(int device);

}  // namespace cuda_on_cpu
