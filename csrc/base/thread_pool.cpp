#include "base/thread_pool.h"

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define PYRL_HAS_FORK
#endif

namespace pyrl {
namespace {

class ThreadPool {
 public:
  void run(int parts, const std::function<void(int)>& body) {
    std::vector<std::exception_ptr> failures(static_cast<std::size_t>(parts));
    const std::function<void(int)> guarded = [&](int part) {
      try {
        body(part);
      } catch (...) {
        failures[static_cast<std::size_t>(part)] = std::current_exception();
      }
    };
    std::unique_lock<std::mutex> alone(in_use_, std::try_to_lock);
    if (alone.owns_lock()) {
      share(parts, guarded);
    } else {
      for (int part = 0; part < parts; ++part) guarded(part);
    }
    for (const std::exception_ptr& failure : failures) {
      if (failure) std::rethrow_exception(failure);
    }
  }

 private:
  void share(int parts, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (started_ < parts - 1) {
      std::thread([this] { work(); }).detach();
      ++started_;
    }
    body_ = &body;
    parts_ = parts;
    next_ = 0;
    unfinished_ = parts;
    if (parts > 1) wake_.notify_all();
    take_parts(lock);
    finished_.wait(lock, [this] { return unfinished_ == 0; });
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return next_ < parts_; });
      take_parts(lock);
    }
  }

  // Called and left with the lock held.
  void take_parts(std::unique_lock<std::mutex>& lock) {
    while (next_ < parts_) {
      const int part = next_++;
      const std::function<void(int)>& body = *body_;
      lock.unlock();
      body(part);
      lock.lock();
      if (--unfinished_ == 0) finished_.notify_one();
    }
  }

  std::mutex in_use_;  // by one caller at a time
  std::mutex mutex_;   // guards what follows
  std::condition_variable wake_, finished_;
  const std::function<void(int)>* body_ = nullptr;
  int parts_ = 0, next_ = 0, unfinished_ = 0, started_ = 0;
};

// Never destroyed: its threads may still be parked when the process exits.
ThreadPool* pool = nullptr;

// After fork() the child has none of the threads and perhaps a locked mutex.
ThreadPool& the_pool() {
  static const bool prepared = [] {
    pool = new ThreadPool;
#ifdef PYRL_HAS_FORK
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
#endif
    return true;
  }();
  static_cast<void>(prepared);
  return *pool;
}

}  // namespace

void run_parts(int parts, const std::function<void(int)>& run) { the_pool().run(parts, run); }

}  // namespace pyrl
