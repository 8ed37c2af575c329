// Columns of a record in one block of memory, which whoever makes the record fills.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <span>
#include <utility>

namespace pyrl::tree {

struct Block {
  std::unique_ptr<std::byte[]> data;
  std::size_t bytes = 0;
};

// The block of a record that is gone: it waits for the next record of its thread.
inline thread_local Block spare_block;

// As vectors the columns would be zeroed before they are written, and the system would give the
// pages of each anew, which costs several times what is written to them.
template <typename T>
class Columns {
 public:
  using Sizes = std::initializer_list<std::pair<std::span<T>*, std::size_t>>;

  Columns() = default;
  explicit Columns(Sizes columns) {
    std::size_t bytes = 0;
    for (const auto& [column, size] : columns) bytes += size * sizeof(T);
    if (bytes <= spare_block.bytes && bytes >= spare_block.bytes / kRoomy)
      std::swap(block_, spare_block);
    else
      block_ = {std::make_unique_for_overwrite<std::byte[]>(bytes), bytes};
    T* begin = reinterpret_cast<T*>(block_.data.get());
    for (const auto& [column, size] : columns) {
      *column = {begin, size};
      begin += size;
    }
  }
  Columns(Columns&& other) noexcept { std::swap(block_, other.block_); }
  Columns& operator=(Columns&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Columns() {
    if (block_.bytes > spare_block.bytes && block_.bytes <= kKept) std::swap(block_, spare_block);
  }

 private:
  static constexpr std::size_t kKept = std::size_t{32} << 20;  // bytes, in each thread
  static constexpr std::size_t kRoomy = 4;  // a block so many times as large is not for this record

  Block block_;
};

}  // namespace pyrl::tree
