// What follows the last few tokens, in any text: counts and mean probabilities, in bounded memory.
//
// For every context of 1, 2, 3, 4 and 6 tokens one cache line holds the tokens seen after it. Lines
// are found by a hash of the context, two places each; of two contexts that want the same place
// the one seen less is forgotten, and so is, in a full line, the token seen least.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>

namespace spec_rollout {

class NgramTable {
 public:
  static constexpr int kOrders[] = {1, 2, 3, 4, 6};
  static constexpr int kNumOrders = 5;
  static constexpr int kMaxOrder = 6;
  static constexpr int kLineTokens = 7;
  // Bounds of the lines per order: 64 KiB to 4 MiB each, in memory that is used only once touched.
  static constexpr int64_t kMinLines = 1 << 10, kMaxLines = 1 << 16;

  struct Entry {
    int32_t token;
    uint16_t count;  // halved when it is full
    uint16_t prob;   // upper half of a float32: running mean of what is known; 0: nothing is
  };
  struct alignas(64) Line {
    uint32_t tag;  // of the context; 0: none
    uint16_t num;  // entries, those seen most first
    uint16_t seen;
    Entry entries[kLineTokens];
  };
  static_assert(sizeof(Line) == 64);

  // Room for about this many tokens of text, within these bounds.
  explicit NgramTable(int64_t num_tokens, int64_t max_lines = kMaxLines);
  // Forgets everything.
  void clear();

  // Where the orders of one context are kept, shortest first.
  struct Place {
    Line* pair[kNumOrders];  // two places in one
    uint32_t tag[kNumOrders];
    int num = 0;  // fewer than kNumOrders near the start of a text
  };

  // The places of the context that ends at `context`, which goes back kMaxOrder tokens or to a
  // negative one, the start of the text. They are fetched from memory meanwhile.
  Place locate(const int32_t* context) const;
  // `token` was drawn with this log-probability (NaN: not known) after the context.
  void learn(const Place& place, int32_t token, float logprob);
  // The same for one order, 0 to kNumOrders - 1: orders are independent, for threads.
  void learn(int order, const Place& place, int32_t token, float p);
  // Lines for the context, shortest first, without those never seen. `out` takes kNumOrders.
  int find(const Place& place, const Line** out) const;

  int64_t num_bytes() const;

 private:
  struct Free {
    void operator()(void* memory) const;
  };

  int64_t lines_per_order_;
  std::unique_ptr<void, Free> memory_;
  Line* lines_;  // in it
};

}  // namespace spec_rollout
