// A forest as bytes: magic, format version, payload size, checksum, payload; little-endian.
#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "base/check.h"
#include "tree/forest.h"

namespace pyrl::tree {
namespace {

static_assert(std::endian::native == std::endian::little, "the byte format is little-endian");

constexpr std::string_view kMagic = "pyrlfrst";
constexpr std::uint32_t kFormat = 3;
constexpr std::size_t kHeader = 8 + 4 + 8 + 8;

// FNV-1a: every step is a bijection of the state, so no single changed byte goes unseen.
std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t hash = 14695981039346656037u;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211u;
  return hash;
}

struct Writer {
  static constexpr bool kReads = false;
  std::string out;

  void raw(const void* data, std::size_t size) { out.append(static_cast<const char*>(data), size); }
  template <typename T>
  void value(const T& value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    raw(&value, sizeof(T));
  }
  template <typename T>
  std::size_t count(const std::vector<T>& values) {
    value(std::uint64_t{values.size()});
    return values.size();
  }
};

struct Reader {
  static constexpr bool kReads = true;
  std::string_view in;

  void raw(void* data, std::size_t size) {
    PYRL_CHECK(size <= in.size(), "forest bytes: a field of ", size, " bytes goes beyond the end (",
               in.size(), " left)");
    std::memcpy(data, in.data(), size);
    in.remove_prefix(size);
  }
  template <typename T>
  void value(T& value) {
    raw(&value, sizeof(T));
  }
  template <typename T>
  std::size_t count(std::vector<T>& values) {
    std::uint64_t size = 0;
    value(size);
    PYRL_CHECK(size <= in.size(), "forest bytes: ", size, " elements go beyond the end (",
               in.size(), " bytes left)");
    values.resize(size);
    return size;
  }
};

template <typename Stream, typename... Values>
void fields(Stream& stream, Values&... values) {
  (stream.value(values), ...);
}

template <typename Stream, typename Vector>
void numbers(Stream& stream, Vector& values) {
  stream.count(values);
  for (auto& value : values) stream.value(value);
}

template <typename Stream, typename Pair>
void pair(Stream& stream, Pair& pair) {
  auto& [first, second] = pair;
  fields(stream, first, second);
}

}  // namespace

// The format, once for both directions. Pages are written as the tokens of their run.
template <typename Self, typename Stream>
void Forest::transfer(Self& self, Stream& stream) {
  fields(stream, self.tokens_, self.tokens_live_);
  pair(stream, self.open_);
  stream.count(self.trees_);
  for (auto& tree : self.trees_) {
    numbers(stream, tree.prompt);
    fields(stream, tree.root, tree.trunks);
    pair(stream, tree.branches);
    for (auto& count : tree.pruned) stream.value(count);
    stream.value(tree.refused);
  }
  stream.count(self.branches_.items);
  for (auto& b : self.branches_.items) {
    fields(stream, b.generation, b.length, b.version, b.segment, b.tree, b.trunk, b.state, b.weight,
           b.standing.log_mass, b.standing.gumbel, b.seed);
    pair(stream, b.in_open);
    pair(stream, b.in_tree);
  }
  stream.count(self.segments_.items);
  for (auto& s : self.segments_.items) {
    fields(stream, s.parent, s.run, s.branch, s.begin, s.end);
    pair(stream, s.children);
    pair(stream, s.sibling);
  }
  stream.count(self.runs_.items);
  for (auto& run : self.runs_.items) {
    fields(stream, run.base, run.segments);
    stream.count(run.steps);
    for (auto& step : run.steps) pair(stream, step);
  }
  for (auto* free : {&self.branches_.free, &self.segments_.free, &self.runs_.free})
    numbers(stream, *free);
}

// Tokens that each run still holds, from the ends of its segments.
std::vector<std::uint32_t> Forest::run_lengths() const {
  std::vector<std::uint32_t> length(runs_.items.size());
  for (const Segment& segment : segments_.items) {
    PYRL_CHECK(segment.run >= kNone && segment.run < runs_.size(), "forest: segment of run ",
               segment.run, " of ", runs_.size());
    PYRL_CHECK(segment.branch >= kNone && segment.branch < branches_.size(),
               "forest: segment of branch ", segment.branch, " of ", branches_.size());
    if (segment.run == kNone) {  // a root, or free
      PYRL_CHECK(segment.branch == kNone && segment.begin == 0 && segment.end == 0,
                 "forest: a root with tokens");
      continue;
    }
    const std::uint32_t base = runs_[segment.run].base, end = end_of(segment);
    PYRL_CHECK(base <= segment.begin && segment.begin <= end, "forest: segment [", segment.begin,
               ", ", end, ") in a run from ", base);
    length[segment.run] = std::max(length[segment.run], end - base);
  }
  return length;
}

std::string Forest::save() const {
  Writer payload;
  transfer(*this, payload);
  const std::vector<std::uint32_t> lengths = run_lengths();
  for (std::size_t run = 0; run < lengths.size(); ++run)
    for (std::uint32_t done = 0; done < lengths[run]; done += kPageTokens)
      payload.raw(pages_[runs_.items[run].pages[done / kPageTokens]],
                  std::min(kPageTokens, lengths[run] - done) * sizeof(TokenRecord));
  Writer file;
  file.raw(kMagic.data(), kMagic.size());
  fields(file, kFormat);
  fields(file, static_cast<const std::uint64_t&>(payload.out.size()));
  fields(file, static_cast<const std::uint64_t&>(checksum(payload.out)));
  file.out += payload.out;
  return std::move(file.out);
}

Forest Forest::load(std::string_view bytes) {
  PYRL_CHECK(bytes.size() >= kHeader, "forest bytes: expected a header of ", kHeader,
             " bytes, got ", bytes.size(), " bytes");
  PYRL_CHECK(bytes.starts_with(kMagic), "forest bytes: expected them to begin with '", kMagic,
             "': this is no saved forest");
  Reader header{bytes.substr(kMagic.size(), kHeader - kMagic.size())};
  std::uint32_t format = 0;
  std::uint64_t size = 0, sum = 0;
  fields(header, format, size, sum);
  PYRL_CHECK(format == kFormat, "forest bytes: expected format ", kFormat, ", got ", format);
  const std::string_view payload = bytes.substr(kHeader);
  PYRL_CHECK(payload.size() == size, "forest bytes: expected ", size, " bytes after the header, ",
             "got ", payload.size());
  PYRL_CHECK(checksum(payload) == sum, "forest bytes: the checksum does not match; they are ",
             "corrupted");
  Forest forest;
  Reader reader{payload};
  transfer(forest, reader);
  const std::vector<std::uint32_t> lengths = forest.run_lengths();
  for (std::size_t run = 0; run < lengths.size(); ++run)
    for (std::uint32_t done = 0; done < lengths[run]; done += kPageTokens) {
      const std::uint32_t page = forest.pages_.take();
      forest.runs_.items[run].pages.push_back(page);
      reader.raw(forest.pages_[page],
                 std::min(kPageTokens, lengths[run] - done) * sizeof(TokenRecord));
    }
  PYRL_CHECK(reader.in.empty(), "forest bytes: ", reader.in.size(), " bytes too many");
  forest.find_tails();
  forest.check();
  return forest;
}

void Forest::find_tails() {
  for (Branch& branch : branches_.items) {
    if (branch.state == State::kFree) continue;
    PYRL_CHECK(branch.segment >= 0 && branch.segment < segments_.size() &&
                   segments_[branch.segment].run != kNone,
               "forest: branch at segment ", branch.segment, " of ", segments_.size());
    const Run& run = runs_[segments_[branch.segment].run];
    const std::uint32_t slot = (branch.length - run.base) % kPageTokens;
    PYRL_CHECK(slot == 0 || !run.pages.empty(), "forest: a branch beyond its run");
    branch.tail = slot == 0 ? nullptr : pages_[run.pages.back()] + slot;
  }
}

}  // namespace pyrl::tree
