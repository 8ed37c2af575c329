// Columns of a record in one allocation, which whoever makes the record fills.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <span>
#include <utility>

namespace pyrl::tree {

// As vectors the columns would be zeroed before they are written. An allocator keeps one freed
// block for the next record more readily than many, whose pages the system then has to give anew.
template <typename T>
class Columns {
 public:
  using Sizes = std::initializer_list<std::pair<std::span<T>*, std::size_t>>;

  Columns() = default;
  explicit Columns(Sizes columns) {
    std::size_t total = 0;
    for (const auto& [column, size] : columns) total += size;
    values_ = std::make_unique_for_overwrite<T[]>(total);
    T* begin = values_.get();
    for (const auto& [column, size] : columns) {
      *column = {begin, size};
      begin += size;
    }
  }

 private:
  std::unique_ptr<T[]> values_;
};

}  // namespace pyrl::tree
