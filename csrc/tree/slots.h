// Plain arrays with recycled indices, and lists threaded through them: no pointers, no hashing.
#pragma once

#include <cstdint>
#include <vector>

namespace pyrl::tree {

constexpr std::int32_t kNone = -1;

template <typename Item>
struct Slots {
  std::vector<Item> items;
  std::vector<std::int32_t> free;

  Item& operator[](std::int32_t index) { return items[static_cast<std::size_t>(index)]; }
  const Item& operator[](std::int32_t index) const {
    return items[static_cast<std::size_t>(index)];
  }

  std::int32_t take() {
    if (free.empty()) {
      items.emplace_back();
      return static_cast<std::int32_t>(items.size() - 1);
    }
    const std::int32_t index = free.back();
    free.pop_back();
    return index;
  }
  void give(std::int32_t index) { free.push_back(index); }

  std::int32_t size() const { return static_cast<std::int32_t>(items.size()); }
  std::size_t live() const { return items.size() - free.size(); }
  std::size_t bytes() const {
    return items.capacity() * sizeof(Item) + free.capacity() * sizeof(std::int32_t);
  }
};

struct Link {
  std::int32_t prev = kNone, next = kNone;
};

struct List {
  std::int32_t first = kNone, last = kNone;
};

template <typename Item>
void push_back(Slots<Item>& slots, Link Item::* link, List& list, std::int32_t index) {
  slots[index].*link = {list.last, kNone};
  (list.last == kNone ? list.first : (slots[list.last].*link).next) = index;
  list.last = index;
}

template <typename Item>
void unlink(Slots<Item>& slots, Link Item::* link, List& list, std::int32_t index) {
  const auto [prev, next] = slots[index].*link;
  (prev == kNone ? list.first : (slots[prev].*link).next) = next;
  (next == kNone ? list.last : (slots[next].*link).prev) = prev;
  slots[index].*link = {};
}

// `fresh`, in no list, takes the place of `old`.
template <typename Item>
void replace(Slots<Item>& slots, Link Item::* link, List& list, std::int32_t old,
             std::int32_t fresh) {
  const auto [prev, next] = slots[fresh].*link = slots[old].*link;
  (prev == kNone ? list.first : (slots[prev].*link).next) = fresh;
  (next == kNone ? list.last : (slots[next].*link).prev) = fresh;
  slots[old].*link = {};
}

}  // namespace pyrl::tree
