// The forest without Python: random histories against plain vectors, and its speed and size.
//
//   forest_driver random OPERATIONS SEED    prints "ok", or throws what is broken
//   forest_driver append BRANCHES STEPS     ns per token, one call per step
//   forest_driver fork LENGTH               us per fork at random positions of such paths
//   forest_driver size TREES LEAVES LENGTH FORKED    bytes per stored token
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "tree/forest.h"

namespace {

using pyrl::tree::Forest;

// CPU time of this process: other load on the machine does not count.
double now_ns() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e9 + static_cast<double>(time.tv_nsec);
}

// Arguments of Forest::append for one token of each branch.
struct Step {
  std::vector<std::int64_t> branch;
  std::vector<std::int32_t> token;
  std::vector<float> value;

  explicit Step(std::vector<std::int64_t> branches)
      : branch(std::move(branches)), token(branch.size(), 7), value(branch.size(), 0.5f) {}
  void append_to(Forest& forest) const {
    forest.append({branch, token, value, value, value, {}, 0});
  }
};

std::vector<std::int64_t> trunks(Forest& forest, std::size_t count) {
  const std::int32_t prompt[] = {1, 2, 3};
  const std::int32_t tree = forest.add_tree(prompt);
  std::vector<std::int64_t> branches;
  for (std::size_t i = 0; i < count; ++i) branches.push_back(forest.add_trunk(tree, i));
  return branches;
}

struct Twin {
  std::int64_t branch;
  std::vector<std::int32_t> tokens;
  bool open = true;
};

class History {
 public:
  explicit History(std::uint64_t seed) : random_(seed) { add_trunk(); }

  void apply() {
    const std::size_t choice = below(100);
    if (choice < 55) {
      append();
    } else if (choice < 72) {
      fork();
    } else if (choice < 80) {
      finish();
    } else if (choice < 94) {
      prune();
    } else if (choice < 98) {
      add_trunk();
    } else {
      forest_ = Forest::load(forest_.save());
    }
  }

  void check() const {
    forest_.check();
    for (const Twin& twin : twins_)
      PYRL_CHECK(forest_.path(twin.branch).tokens == twin.tokens, "path of ", twin.branch);
    std::vector<std::int64_t> all;
    for (const Twin& twin : twins_) all.push_back(twin.branch);
    const pyrl::tree::Segments segments = forest_.segments(all);
    for (std::size_t n = 0; n < all.size(); ++n) {
      std::int64_t length = 0;
      for (auto e = segments.entry_offset[n]; e < segments.entry_offset[n + 1]; ++e)
        length += segments.entry_length[static_cast<std::size_t>(e)];
      PYRL_CHECK(length == forest_.length(all[n]), "segments of ", all[n]);
    }
  }

 private:
  std::size_t below(std::size_t n) { return random_() % n; }
  Twin& any() { return twins_[below(twins_.size())]; }

  void add_trunk() {
    if (twins_.size() < 64) twins_.push_back({trunks(forest_, 1).front(), {}});
  }
  void append() {
    for (std::size_t repeat = below(70); repeat > 0; --repeat) {
      std::vector<std::int64_t> branches;
      for (Twin& twin : twins_) {
        if (!twin.open || below(3) == 0) continue;
        twin.tokens.push_back(7);
        branches.push_back(twin.branch);
      }
      Step(branches).append_to(forest_);
    }
  }
  void fork() {
    if (twins_.empty() || twins_.size() > 64) return;
    const Twin source = any();
    const std::size_t at = below(source.tokens.size() + 1);
    const std::vector<std::uint64_t> seeds(1 + below(3), 1);
    for (const std::int64_t branch :
         forest_.fork(source.branch, static_cast<std::int64_t>(at), seeds, below(2) == 0))
      twins_.push_back({branch, {source.tokens.begin(), source.tokens.begin() + at}});
  }
  void finish() {
    if (twins_.empty()) return;
    Twin& twin = any();
    const std::uint8_t reason = 1;
    if (std::exchange(twin.open, false)) forest_.finish({&twin.branch, 1}, {&reason, 1});
  }
  void prune() {
    if (twins_.empty()) return;
    const std::size_t index = below(twins_.size());
    const std::int64_t branch = twins_[index].branch;
    forest_.prune(branch, 1 + static_cast<std::int64_t>(below(5)));
    twins_.erase(twins_.begin() + static_cast<std::ptrdiff_t>(index));
    try {
      forest_.length(branch);
    } catch (const pyrl::StaleHandle&) {
      return;
    }
    throw std::logic_error("a pruned handle is still accepted");
  }

  std::mt19937_64 random_;
  Forest forest_;
  std::vector<Twin> twins_;
};

void random_history(std::size_t operations, std::uint64_t seed) {
  History history(seed);
  for (std::size_t i = 0; i < operations; ++i) {
    history.apply();
    history.check();
  }
  std::puts("ok");
}

void measure_append(std::size_t branches, int steps) {
  double best = 1e30;
  for (int round = 0; round < 5; ++round) {  // each in fresh memory, page faults included
    Forest forest;
    const Step step(trunks(forest, branches));
    const double begin = now_ns();
    for (int i = 0; i < steps; ++i) step.append_to(forest);
    best = std::min(best, (now_ns() - begin) / (static_cast<double>(branches) * steps));
  }
  std::printf("%.2f\n", best);
}

void measure_fork(std::int64_t length) {
  constexpr int kForks = 16;  // of one path
  const int paths = length > 100'000 ? 8 : 64;
  std::mt19937_64 random(1);
  Forest forest;
  const Step step(trunks(forest, static_cast<std::size_t>(paths)));
  for (std::int64_t i = 0; i < length; ++i) step.append_to(forest);
  const std::uint64_t seed = 1;
  const double begin = now_ns();
  for (const std::int64_t branch : step.branch)
    for (int i = 0; i < kForks; ++i)
      forest.fork(branch, static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(length)),
                  {&seed, 1}, true);
  std::printf("%.3f\n", (now_ns() - begin) / 1000 / (paths * kForks));
}

// Leaves of `length` tokens each: independent, or (forked) grown from an eighth as many trunks,
// each forked seven times at random positions.
void measure_size(int trees, std::size_t leaves, std::int64_t length, bool forked) {
  std::mt19937_64 random(1);
  Forest forest;
  for (int tree = 0; tree < trees; ++tree) {
    const Step step(trunks(forest, forked ? leaves / 8 : leaves));
    for (std::int64_t i = 0; i < length; ++i) step.append_to(forest);
    for (const std::int64_t branch : forked ? step.branch : std::vector<std::int64_t>()) {
      for (int i = 0; i < 7; ++i) {
        const auto at = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(length));
        const std::uint64_t seed = 1;
        const Step tail(forest.fork(branch, at, {&seed, 1}, true));
        for (std::int64_t token = at; token < length; ++token) tail.append_to(forest);
      }
    }
  }
  const pyrl::tree::Stats stats = forest.stats();
  std::printf("%.2f\n", static_cast<double>(stats.bytes) / static_cast<double>(stats.tokens_live));
}

long number(char** arguments, int index) { return std::stol(arguments[index]); }

int run(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "random" && count == 4) {
    random_history(static_cast<std::size_t>(number(arguments, 2)),
                   static_cast<std::uint64_t>(number(arguments, 3)));
  } else if (what == "append" && count == 4) {
    measure_append(static_cast<std::size_t>(number(arguments, 2)),
                   static_cast<int>(number(arguments, 3)));
  } else if (what == "fork" && count == 3) {
    measure_fork(number(arguments, 2));
  } else if (what == "size" && count == 6) {
    measure_size(static_cast<int>(number(arguments, 2)),
                 static_cast<std::size_t>(number(arguments, 3)), number(arguments, 4),
                 number(arguments, 5) != 0);
  } else {
    std::fputs(
        "usage: random OPERATIONS SEED | append BRANCHES STEPS | fork LENGTH | "
        "size TREES LEAVES LENGTH FORKED\n",
        stderr);
    return 2;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "forest_driver: %s\n", error.what());
    return 1;
  }
}
