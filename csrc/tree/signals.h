// What a branch looked like while it was sampled, and what follows from it: windowed entropy and
// confidence, running quantiles of both, and the fork and prune decisions of one decode step
// (ETMR's online form, arXiv:2508.11356; ECHO's tree, arXiv:2602.02150).
//
// A decision at token t reads the distributions of tokens 0..t, never the drawn token t itself:
// forking is a stopping time, so every continuation is an exact sample given its prefix.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace pyrl::tree {

// Quantiles of a stream over the last `steps` optimizer steps, from counts in logarithmic bins
// (relative width 1/64 between 2^-24 and 2^8; below is 0). Counts do not depend on the order of
// insertion, so a rollout's thresholds do not depend on its schedule.
class Sketch {
 public:
  explicit Sketch(int steps = 4);
  void add(double value);
  void next_step();
  std::int64_t count() const { return total_count_; }
  // The edge below, or above, the bin of the sorted values' quantile (q in [0, 1]); 0 when empty.
  // A decision that takes ties compares with the edge below, one that leaves them with that above.
  double quantile(double q) const { return edge(rank_bin(q), 0); }
  double quantile_above(double q) const { return edge(rank_bin(q), 1); }
  std::vector<std::uint32_t>& ring() { return ring_; }
  const std::vector<std::uint32_t>& ring() const { return ring_; }
  int current() const { return current_; }
  void restore(std::vector<std::uint32_t> ring, int current);

  static constexpr int kBinsPerOctave = 64;
  static constexpr int kLowOctave = -24;
  static constexpr int kHighOctave = 8;
  static constexpr int kSide = (kHighOctave - kLowOctave) * kBinsPerOctave;
  static constexpr int kBins = 2 * kSide + 1;

 private:
  static int bin(double value);
  static double edge(int bin, int side);
  int rank_bin(double q) const;
  int steps_, current_ = 0;
  std::int64_t total_count_ = 0;
  std::vector<std::uint32_t> ring_;  // steps x bins
  std::vector<std::int64_t> total_;  // bins
};

enum PruneReason : std::uint8_t {
  kKeep = 0,
  kLowConfidence = 1,
  kTailDecline = 2,
  kEntropySpike = 3
};

// The quantile `q` of its sketch, or the fixed number `value` where q < 0.
struct Threshold {
  double q = -1;
  double value = 0;
};

inline constexpr int kLongestWindow = 1 << 20;

struct SignalSpec {
  int smooth_window =
      4;  // tokens of the moving average of entropy, and of what dH is taken against
  int group_window = 32;   // tokens of group confidence; windows grow until they are full
  int tail_window = 64;    // tokens of tail confidence
  int min_tokens = 4;      // no decision before this many tokens
  int warmup_traces = 16;  // finished traces before quantile thresholds count as calibrated
  int history = 4;         // steps that the quantiles look back on

  // Without a threshold a signal has no say: it stops no fork, and prunes nothing.
  bool fork = false;
  Threshold entropy_high, entropy_low;
  std::optional<Threshold> confidence_fork = Threshold{}, entropy_rise = Threshold{};
  double alpha = 2, beta = 1;  // weight of entropy and of confidence in the width
  int width_min = 1, width_max = 4;
  int cooldown = 32;  // tokens without a fork after one; siblings inherit it
  int max_forks = 0;  // forks on one path; 0: no limit

  bool prune = false;
  std::optional<Threshold> confidence_low = Threshold{}, tail_low = Threshold{},
                           entropy_spike = Threshold{};
  int decline_run = 64;  // consecutive drops of tail confidence
  int spike_run = 3;     // consecutive entropy spikes
};

// One row per observed branch; what Python rules read and C++ rules have decided.
struct Observed {
  std::vector<float> smooth_entropy, entropy_rise, group_confidence, tail_confidence,
      min_confidence;
  std::vector<std::int32_t>
      width;  // 1: no fork; otherwise branches after the fork, this one included
  std::vector<std::uint8_t> prune;  // PruneReason
  // Whether any rule may fork here: calibrated, past min_tokens, cooled down, forks left, and not
  // the first token of a sibling, which its parent has decided about.
  std::vector<std::uint8_t> ready;
};

struct Thresholds {
  bool calibrated = false;
  double entropy_high = 0, entropy_low = 0, confidence_fork = 0, entropy_rise = 0;
  double confidence_low = 0, tail_low = 0, entropy_spike = 0;
};

class Signals {
 public:
  explicit Signals(const SignalSpec& spec);

  // Reads the thresholds off the sketches and turns their windows by one step.
  void begin_step();
  // Reads the thresholds again without turning: after the warm-up traces of a run's first step.
  void calibrate();
  // One more token of each branch; std::invalid_argument, with nothing changed, unless the branches
  // are distinct and all entropies and confidences finite.
  Observed observe(std::span<const std::int64_t> branch, std::span<const float> entropy,
                   std::span<const float> confidence);
  // Puts the windows of a finished branch back to where they were after these tokens, so that it
  // can be forked there. The sketches have counted them already.
  void rewind(std::int64_t branch, std::span<const float> entropy,
              std::span<const float> confidence);
  // Children take over the parent's windows; all of them cool down. Their next token is drawn from
  // the distribution that the parent has just been observed with, so it is not counted again.
  void inherit(std::int64_t parent, std::span<const std::int64_t> children);
  // A finished or pruned branch: its lowest group confidence joins the sketch of traces.
  void close(std::span<const std::int64_t> branch);
  const Thresholds& thresholds() const { return thresholds_; }

  std::string save() const;  // the sketches; branches in flight are not part of it
  void load(const std::string& bytes);

 private:
  struct Branch {
    std::int64_t handle = -1;
    std::int64_t tokens = 0;
    std::int64_t call = 0;  // the last `observe` that named it: finds duplicates
    double smooth_sum = 0, group_sum = 0, tail_sum = 0;
    float last_tail = 0, min_group = 0;
    int drops = 0, spikes = 0, cooldown = 0, forks = 0;
    bool repeat = false;
    std::vector<float> window;  // rings: entropy[smooth], confidence[group], confidence[tail]
  };
  struct Reading {
    float smooth, rise, group;
  };
  Branch& branch(std::int64_t handle);
  Reading slide_windows(Branch& branch, float entropy, float confidence) const;
  void observe_one(Branch& branch, float entropy, float confidence, std::size_t row, Observed& out);
  void observe_repeat(Branch& branch, std::size_t row, Observed& out) const;
  bool ready(const Branch& branch) const;
  std::int32_t width(float entropy, const Reading& reading) const;
  std::uint8_t prune_reason(const Branch& branch) const;
  std::array<Sketch*, 5> sketches();

  SignalSpec spec_;
  Thresholds thresholds_;
  Sketch entropy_, rise_, group_, tail_, trace_;
  std::vector<Branch> branches_;  // by handle index
  std::int64_t call_ = 0;
};

}  // namespace pyrl::tree
