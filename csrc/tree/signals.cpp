#include "tree/signals.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>

#include "base/check.h"

namespace pyrl::tree {

// ---- Sketch

Sketch::Sketch(int steps)
    : steps_(steps), ring_(static_cast<std::size_t>(steps) * kBins), total_(kBins) {
  PYRL_CHECK(steps >= 1, "Sketch: expected steps >= 1, got ", steps);
}

int Sketch::bin(double value) {
  const double largest = std::ldexp(1.0, kLowOctave + kSide / kBinsPerOctave);
  const double size = std::min(std::abs(value), largest);    // also of an infinity
  if (!(size >= std::ldexp(1.0, kLowOctave))) return kSide;  // zero, and NaN
  int octave;
  const double mantissa = 2 * std::frexp(size, &octave) - 1;  // [0, 1)
  const int offset = std::min(
      (octave - 1 - kLowOctave) * kBinsPerOctave + static_cast<int>(mantissa * kBinsPerOctave),
      kSide - 1);
  return value > 0 ? kSide + 1 + offset : kSide - 1 - offset;
}

// `side` 0: the edge below, 1: the edge above. Zero's bin is taken for the number.
double Sketch::edge(int bin, int side) {
  if (bin == kSide) return 0;
  if (bin < kSide) return -edge(2 * kSide - bin, 1 - side);
  const int offset = bin - kSide - 1;
  const double mantissa = 1 + static_cast<double>(offset % kBinsPerOctave + side) / kBinsPerOctave;
  return std::ldexp(mantissa, kLowOctave + offset / kBinsPerOctave);
}

void Sketch::add(double value) {
  const int b = bin(value);
  ++ring_[static_cast<std::size_t>(current_) * kBins + b];
  ++total_[b];
  ++total_count_;
}

void Sketch::next_step() {
  current_ = (current_ + 1) % steps_;
  const std::size_t row = static_cast<std::size_t>(current_) * kBins;
  for (int b = 0; b < kBins; ++b) {
    total_[b] -= ring_[row + b];
    total_count_ -= ring_[row + b];
    ring_[row + b] = 0;
  }
}

int Sketch::rank_bin(double q) const {
  if (total_count_ == 0) return kSide;
  const double rank = q * static_cast<double>(total_count_ - 1);
  std::int64_t below = 0;
  int b = 0;
  while (b < kBins - 1 && static_cast<double>(below + total_[b]) <= rank) below += total_[b++];
  return b;
}

void Sketch::restore(std::vector<std::uint32_t> ring, int current) {
  PYRL_CHECK(ring.size() == ring_.size(), "Signals.load: expected ", ring_.size(),
             " counts in a sketch, got ", ring.size());
  PYRL_CHECK(current >= 0 && current < steps_, "Signals.load: expected a step below ", steps_,
             ", got ", current);
  ring_ = std::move(ring);
  current_ = current;
  total_count_ = 0;
  std::fill(total_.begin(), total_.end(), 0);
  for (std::size_t i = 0; i < ring_.size(); ++i) {
    total_[i % kBins] += ring_[i];
    total_count_ += ring_[i];
  }
}

// ---- Signals

Signals::Signals(const SignalSpec& spec)
    : spec_(spec),
      entropy_(spec.history),
      rise_(spec.history),
      group_(spec.history),
      tail_(spec.history),
      trace_(spec.history) {
  for (const int window : {spec.smooth_window, spec.group_window, spec.tail_window})
    PYRL_CHECK(window >= 1 && window <= kLongestWindow, "SignalSpec: expected windows of 1 to ",
               kLongestWindow, " tokens, got smooth_window=", spec.smooth_window,
               ", group_window=", spec.group_window, ", tail_window=", spec.tail_window);
  PYRL_CHECK(std::isfinite(spec.alpha) && std::isfinite(spec.beta),
             "SignalSpec: expected numbers, got alpha=", spec.alpha, ", beta=", spec.beta);
  PYRL_CHECK(spec.cooldown >= 0 && spec.max_forks >= 0 && spec.min_tokens >= 0,
             "SignalSpec: expected cooldown, max_forks and min_tokens >= 0, got ", spec.cooldown,
             ", ", spec.max_forks, " and ", spec.min_tokens);
  PYRL_CHECK(spec.width_min >= 1 && spec.width_max >= spec.width_min,
             "SignalSpec: expected 1 <= width_min <= width_max, got ", spec.width_min, " and ",
             spec.width_max);
  PYRL_CHECK(spec.decline_run >= 1 && spec.spike_run >= 1,
             "SignalSpec: expected runs of at least 1 token, got decline_run=", spec.decline_run,
             ", spike_run=", spec.spike_run);
  for (const std::optional<Threshold>& threshold :
       {std::optional(spec.entropy_high), std::optional(spec.entropy_low), spec.confidence_fork,
        spec.entropy_rise, spec.confidence_low, spec.tail_low, spec.entropy_spike})
    PYRL_CHECK(!threshold || (threshold->q <= 1 && !std::isnan(threshold->value)),
               "SignalSpec: expected quantiles of at most 1 and values that are numbers, got q=",
               threshold->q, ", value=", threshold->value);
  calibrate();
}

std::array<Sketch*, 5> Signals::sketches() { return {&entropy_, &rise_, &group_, &tail_, &trace_}; }

namespace {

using Quantile = double (Sketch::*)(double) const;
constexpr Quantile kTakesTies = &Sketch::quantile;
constexpr Quantile kLeavesTies = &Sketch::quantile_above;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double read(const Threshold& threshold, const Sketch& sketch, Quantile quantile) {
  return threshold.q >= 0 ? (sketch.*quantile)(threshold.q) : threshold.value;
}

// Confidence is packed against 1, so the sketches hold doubt = 1 - confidence, which is not.
double read_confidence(const Threshold& threshold, const Sketch& doubt, Quantile quantile) {
  return threshold.q >= 0 ? 1 - (doubt.*quantile)(1 - threshold.q) : threshold.value;
}

}  // namespace

// Forks take ties. Nothing is pruned that ties with the quantile: where all samples are alike, none
// is worse than the others.
void Signals::calibrate() {
  Thresholds& t = thresholds_;
  t.entropy_high = read(spec_.entropy_high, entropy_, kTakesTies);
  t.entropy_low = read(spec_.entropy_low, entropy_, kTakesTies);
  const auto confidence = [](const std::optional<Threshold>& threshold, const Sketch& doubt,
                             Quantile quantile, double off) {
    return threshold ? read_confidence(*threshold, doubt, quantile) : off;
  };
  const auto rise = [this](const std::optional<Threshold>& threshold, Quantile quantile,
                           double off) {
    return threshold ? read(*threshold, rise_, quantile) : off;
  };
  t.confidence_fork = confidence(spec_.confidence_fork, group_, kTakesTies, kInfinity);
  t.entropy_rise = rise(spec_.entropy_rise, kTakesTies, -kInfinity);
  t.confidence_low = confidence(spec_.confidence_low, trace_, kLeavesTies, -kInfinity);
  t.tail_low = confidence(spec_.tail_low, tail_, kLeavesTies, -kInfinity);
  t.entropy_spike = rise(spec_.entropy_spike, kLeavesTies, kInfinity);
  t.calibrated = trace_.count() >= spec_.warmup_traces;
}

void Signals::begin_step() {
  calibrate();
  for (Sketch* sketch : sketches()) sketch->next_step();
  branches_.clear();
}

Signals::Branch& Signals::branch(std::int64_t handle) {
  PYRL_CHECK(handle >= 0, "Signals: expected a handle of a forest, got ", handle);
  const auto index =
      static_cast<std::size_t>(handle >> 32);  // Forest's handles: index | generation
  if (index >= branches_.size()) branches_.resize(std::max(index + 1, 2 * branches_.size()));
  Branch& state = branches_[index];
  if (state.handle != handle) {
    state = Branch{};
    state.handle = handle;
    state.window.assign(spec_.smooth_window + spec_.group_window + spec_.tail_window, 0.0f);
  }
  return state;
}

namespace {

// Puts `value` into a ring of `width` tokens and returns the mean of what the ring now holds.
float slide(float* ring, int width, std::int64_t tokens, float value, double& sum) {
  float& slot = ring[tokens % width];
  if (tokens >= width) sum -= slot;
  slot = value;
  sum += value;
  return static_cast<float>(sum / static_cast<double>(std::min<std::int64_t>(tokens + 1, width)));
}

}  // namespace

Signals::Reading Signals::slide_windows(Branch& state, float entropy, float confidence) const {
  float* entropies = state.window.data();
  float* group_ring = entropies + spec_.smooth_window;
  float* tail_ring = group_ring + spec_.group_window;
  const std::int64_t filled = std::min<std::int64_t>(state.tokens, spec_.smooth_window);
  const float before =
      filled ? static_cast<float>(state.smooth_sum / static_cast<double>(filled)) : entropy;
  const float rise = entropy - before;
  const float smooth =
      slide(entropies, spec_.smooth_window, state.tokens, entropy, state.smooth_sum);
  const float group =
      slide(group_ring, spec_.group_window, state.tokens, confidence, state.group_sum);
  const float tail = slide(tail_ring, spec_.tail_window, state.tokens, confidence, state.tail_sum);

  state.min_group = state.tokens == 0 ? group : std::min(state.min_group, group);
  state.drops = state.tokens > 0 && tail < state.last_tail ? state.drops + 1 : 0;
  state.spikes = rise > thresholds_.entropy_spike ? state.spikes + 1 : 0;
  state.last_tail = tail;
  ++state.tokens;
  return {smooth, rise, group};
}

void Signals::observe_one(Branch& state, float entropy, float confidence, std::size_t row,
                          Observed& out) {
  const Reading reading = slide_windows(state, entropy, confidence);
  entropy_.add(entropy);
  rise_.add(reading.rise);
  group_.add(1.0 - reading.group);
  tail_.add(1.0 - state.last_tail);

  out.smooth_entropy[row] = reading.smooth;
  out.entropy_rise[row] = reading.rise;
  out.group_confidence[row] = reading.group;
  out.tail_confidence[row] = state.last_tail;
  out.min_confidence[row] = state.min_group;
  out.prune[row] = prune_reason(state);
  out.ready[row] = ready(state);
  out.width[row] = out.prune[row] == kKeep && out.ready[row] ? width(entropy, reading) : 1;
  if (state.cooldown > 0) --state.cooldown;
}

// The distribution of the parent's last observation, which has been decided about.
void Signals::observe_repeat(Branch& state, std::size_t row, Observed& out) const {
  const auto filled = [&state](int window) {
    return static_cast<double>(std::min<std::int64_t>(state.tokens, window));
  };
  out.smooth_entropy[row] = static_cast<float>(state.smooth_sum / filled(spec_.smooth_window));
  out.group_confidence[row] = static_cast<float>(state.group_sum / filled(spec_.group_window));
  out.tail_confidence[row] = state.last_tail;
  out.min_confidence[row] = state.min_group;
  out.width[row] = 1;
  state.repeat = false;
}

bool Signals::ready(const Branch& state) const {
  return thresholds_.calibrated && state.tokens > spec_.min_tokens && state.cooldown == 0 &&
         (spec_.max_forks == 0 || state.forks < spec_.max_forks);
}

std::int32_t Signals::width(float entropy, const Reading& reading) const {
  if (!spec_.fork) return 1;
  const Thresholds& t = thresholds_;
  if (entropy < t.entropy_high || reading.group > t.confidence_fork ||
      reading.rise < t.entropy_rise)
    return 1;
  // A collapsed policy has no spread of entropy to measure against: nothing to explore there.
  if (entropy <= 0) return 1;
  const double spread = std::max(t.entropy_high - t.entropy_low, 1e-12);
  const double doubt = 1.0 - reading.group, doubt_fork = 1.0 - t.confidence_fork;
  // From 0 at the threshold towards 1 where group confidence is far below it.
  const double excess = doubt > 0 && spec_.confidence_fork ? 1 - doubt_fork / doubt : 0;
  const double raw =
      spec_.width_min + spec_.alpha * (entropy - t.entropy_low) / spread + spec_.beta * excess;
  const double bounded =
      std::clamp(raw, static_cast<double>(spec_.width_min), static_cast<double>(spec_.width_max));
  return static_cast<std::int32_t>(std::nearbyint(bounded));
}

std::uint8_t Signals::prune_reason(const Branch& state) const {
  if (!spec_.prune || !thresholds_.calibrated || state.tokens <= spec_.min_tokens) return kKeep;
  if (state.min_group < thresholds_.confidence_low) return kLowConfidence;
  if (state.drops >= spec_.decline_run && state.last_tail < thresholds_.tail_low)
    return kTailDecline;
  if (state.spikes >= spec_.spike_run) return kEntropySpike;
  return kKeep;
}

Observed Signals::observe(std::span<const std::int64_t> handle, std::span<const float> entropy,
                          std::span<const float> confidence) {
  const std::size_t rows = handle.size();
  PYRL_CHECK(entropy.size() == rows && confidence.size() == rows, "observe: expected ", rows,
             " entropies and confidences, got ", entropy.size(), " and ", confidence.size());
  // A NaN would pass every comparison below that leaves a branch alone.
  for (std::size_t row = 0; row < rows; ++row)
    PYRL_CHECK(std::isfinite(entropy[row]) && std::isfinite(confidence[row]),
               "observe: expected finite entropy and confidence, got ", entropy[row], " and ",
               confidence[row], " for branch ", handle[row]);
  ++call_;
  for (const std::int64_t h : handle) {
    std::int64_t& call = branch(h).call;
    PYRL_CHECK(call != call_, "observe: expected distinct branches, got ", h, " twice");
    call = call_;
  }
  Observed out;
  for (auto* values : {&out.smooth_entropy, &out.entropy_rise, &out.group_confidence,
                       &out.tail_confidence, &out.min_confidence})
    values->resize(rows);
  out.width.resize(rows);
  out.prune.resize(rows);
  out.ready.resize(rows);
  for (std::size_t row = 0; row < rows; ++row) {
    Branch& state = branch(handle[row]);
    if (state.repeat)
      observe_repeat(state, row, out);
    else
      observe_one(state, entropy[row], confidence[row], row, out);
  }
  return out;
}

void Signals::rewind(std::int64_t handle, std::span<const float> entropy,
                     std::span<const float> confidence) {
  PYRL_CHECK(entropy.size() == confidence.size() && !entropy.empty(),
             "rewind: expected as many entropies as confidences, and one at least, got ",
             entropy.size(), " and ", confidence.size());
  for (std::size_t t = 0; t < entropy.size(); ++t)
    PYRL_CHECK(std::isfinite(entropy[t]) && std::isfinite(confidence[t]),
               "rewind: expected finite entropies and confidences, got ", entropy[t], " and ",
               confidence[t], " at ", t);
  branch(handle).handle = -1;  // so that it starts empty
  Branch& state = branch(handle);
  for (std::size_t t = 0; t < entropy.size(); ++t) slide_windows(state, entropy[t], confidence[t]);
}

void Signals::inherit(std::int64_t parent, std::span<const std::int64_t> children) {
  Branch& state = branch(parent);
  state.cooldown = spec_.cooldown;
  ++state.forks;
  const Branch copy = state;  // branch() may move the vector
  for (const std::int64_t child : children) {
    Branch& sibling = branch(child);
    sibling = copy;
    sibling.handle = child;
    sibling.repeat = true;
  }
}

void Signals::close(std::span<const std::int64_t> handle) {
  for (const std::int64_t h : handle) {
    Branch& state = branch(h);
    if (state.tokens > 0) trace_.add(1.0 - state.min_group);
    state.window = {};
    state.handle = -1;
  }
}

namespace {

// FNV-1a
std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const char byte : bytes) hash = (hash ^ static_cast<std::uint8_t>(byte)) * 0x100000001b3;
  return hash;
}

}  // namespace

std::string Signals::save() const {
  std::string bytes;
  const auto put = [&bytes](const void* data, std::size_t size) {
    bytes.append(static_cast<const char*>(data), size);
  };
  for (const Sketch* sketch : {&entropy_, &rise_, &group_, &tail_, &trace_}) {
    const std::int32_t current = sketch->current();
    put(&current, sizeof current);
    put(sketch->ring().data(), sketch->ring().size() * sizeof(std::uint32_t));
  }
  const std::uint64_t sum = checksum(bytes);
  put(&sum, sizeof sum);
  return bytes;
}

void Signals::load(const std::string& bytes) {
  const std::size_t counts = entropy_.ring().size() * sizeof(std::uint32_t);
  const std::size_t payload = 5 * (sizeof(std::int32_t) + counts);
  std::uint64_t sum;
  PYRL_CHECK(bytes.size() == payload + sizeof sum, "Signals.load: expected ", payload + sizeof sum,
             " bytes (", spec_.history, " steps of history), got ", bytes.size());
  std::memcpy(&sum, bytes.data() + payload, sizeof sum);
  PYRL_CHECK(checksum(std::string_view(bytes).substr(0, payload)) == sum,
             "Signals.load: the checksum does not match; the bytes are corrupted");
  const char* at = bytes.data();
  for (Sketch* sketch : sketches()) {
    std::int32_t current;
    std::memcpy(&current, at, sizeof current);
    std::vector<std::uint32_t> ring(sketch->ring().size());
    std::memcpy(ring.data(), at + sizeof current, counts);
    sketch->restore(std::move(ring), current);
    at += sizeof current + counts;
  }
  calibrate();
}

}  // namespace pyrl::tree
