// Token storage of the forest: 1 KiB pages that never move, recycled through a free list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace pyrl::tree {

// What is kept of one token. The top bit of `id` marks a forced token: no sample of the policy.
struct TokenRecord {
  std::uint32_t id;
  float logprob;     // of the drawn token (nats)
  float entropy;     // of the distribution it was drawn from (nats)
  float confidence;  // mass of the five most probable tokens
};
static_assert(sizeof(TokenRecord) == 16);

constexpr std::uint32_t kForcedBit = 1u << 31;

// 64 tokens: half a page is lost per branch, and one kibibyte keeps 64 branches of 1000 tokens
// within 17 bytes per token, page padding included.
constexpr std::uint32_t kPageTokens = 64;
constexpr std::size_t kPageBytes = kPageTokens * sizeof(TokenRecord);

class TokenPages {
 public:
  std::uint32_t take() {
    if (!free_.empty()) {
      const std::uint32_t page = free_.back();
      free_.pop_back();
      return page;
    }
    if (made_ == blocks_.size() * kBlockPages) blocks_.emplace_back(make_block());
    return made_++;
  }

  void give(std::uint32_t page) { free_.push_back(page); }

  // Aligned to kPageBytes, so that a write position alone tells when its page is full.
  TokenRecord* operator[](std::uint32_t page) const {
    return blocks_[page / kBlockPages].get() + std::size_t{page % kBlockPages} * kPageTokens;
  }

  std::size_t in_use() const { return made_ - free_.size(); }
  std::size_t made() const { return made_; }
  std::size_t bytes() const {
    return blocks_.size() * kBlockPages * kPageBytes + free_.capacity() * sizeof(std::uint32_t);
  }

 private:
  static constexpr std::uint32_t kBlockPages = 1024;
  static constexpr std::align_val_t kAlign{kPageBytes};

  struct Release {
    void operator()(TokenRecord* block) const { ::operator delete(block, kAlign); }
  };
  static TokenRecord* make_block() {
    return static_cast<TokenRecord*>(::operator new(kBlockPages * kPageBytes, kAlign));
  }

  std::vector<std::unique_ptr<TokenRecord, Release>> blocks_;
  std::vector<std::uint32_t> free_;
  std::uint32_t made_ = 0;
};

}  // namespace pyrl::tree
