#include "drafting/token_guess.h"

#include <algorithm>
#include <cmath>

#include "spec_rollout/bfloat16_bits.h"

namespace spec_rollout {
namespace {

constexpr int kMaxCandidates = 64;
constexpr int kMaxTokens = 16;  // of one context

// A token drawn with an unknown probability is believed to have had its share of the tokens seen,
// less something for those that were not.
constexpr float kSeenMass = 0.9f;
// A context seen so many times counts half.
constexpr float kTableDoubt = 1.0f, kGroupDoubt = 0.5f;
// What is always left for tokens never seen in a context.
constexpr float kLeftMass = 1e-4f;
// Less likely tokens are not worth their noise.
constexpr float kLeastProbability = 2e-3f;

struct Seen {
  int32_t token;
  float count, known, sum;  // sightings, those with a probability, and the sum of these
};

class Blend {
 public:
  // What was seen after a longer context than those before, `source`.
  void add(const Seen* seen, int num, float doubt, int source) {
    float total = 0.0f, mass = 0.0f, weighed = 0.0f;
    for (int i = 0; i < num; ++i) total += seen[i].count;
    float p[kMaxTokens];
    for (int i = 0; i < num; ++i) {
      p[i] = seen[i].known > 0.0f ? seen[i].sum / seen[i].known : kSeenMass * seen[i].count / total;
      mass += p[i];
      weighed += p[i] * seen[i].count;
    }
    if (mass > 1.0f) {  // not one context but several that look alike: shares decide
      for (int i = 0; i < num; ++i) p[i] *= seen[i].count / weighed;
      mass = 1.0f;
    }
    const float left = std::max(1.0f - mass, kLeftMass);
    const float share = total / (total + doubt), own = share / (mass + left);
    // Tokens not seen here share what is left as the shorter contexts would have it.
    float unseen = rest_;
    for (int c = 0; c < num_; ++c) {
      where_[c] = -1;
      for (int i = 0; i < num && where_[c] < 0; ++i) {
        if (seen[i].token == tokens_[c]) where_[c] = i;
      }
      if (where_[c] < 0) unseen += p_[c];
    }
    const float keep = 1.0f - share, scale = keep + own * left / std::max(unseen, 1e-9f);
    bool placed[kMaxTokens] = {};
    for (int c = 0; c < num_; ++c) {
      if (where_[c] < 0) {
        p_[c] *= scale;
      } else {
        p_[c] = keep * p_[c] + own * p[where_[c]];
        sources_[c] = source;
        placed[where_[c]] = true;
      }
    }
    rest_ *= scale;
    for (int i = 0; i < num; ++i) {
      if (placed[i] || num_ == kMaxCandidates) continue;
      tokens_[num_] = seen[i].token;
      sources_[num_] = source;
      p_[num_++] = own * p[i];
    }
  }

  TokenGuess best(NoiseLaw law, const int64_t* key, int64_t position) const {
    TokenGuess guess;
    if (num_ == 0) return guess;
    if (key == nullptr) {
      const int c = static_cast<int>(std::max_element(p_, p_ + num_) - p_);
      guess = {tokens_[c], sources_[c], p_[c]};
      return guess;
    }
    // The best of the tokens that are no candidates stands about here.
    float first = -INFINITY, second = std::log(rest_ + 1e-6f);
    for (int c = 0; c < num_; ++c) {
      if (p_[c] < kLeastProbability) continue;
      const float score = std::log(p_[c]) + noise_of(law, *key, position, tokens_[c]);
      if (score > first) {
        second = std::max(second, first);
        first = score;
        guess.token = tokens_[c];
        guess.source = sources_[c];
      } else {
        second = std::max(second, score);
      }
    }
    guess.chance = first > second ? 1.0 - std::exp(second - first) : 0.0;
    return guess;
  }

 private:
  int32_t tokens_[kMaxCandidates];
  float p_[kMaxCandidates];
  int sources_[kMaxCandidates];
  int where_[kMaxCandidates];  // of `add`: which of the tokens seen it is
  int num_ = 0;
  float rest_ = 1.0f;  // probability of all other tokens
};

// What a context has to say to belong to a prompt rather than to any text.
constexpr double kContextBits = 17.0;

}  // namespace

GroupContexts::GroupContexts(double bits) {
  // A text of one token has none.
  const double per_token = std::max(bits, 1.0);
  const int least = std::clamp(static_cast<int>(std::lround(kContextBits / per_token)), 1, 4);
  constexpr int kHalves[kNumGroupContexts] = {2, 3, 4, 6, 8, 12, 16};
  for (int i = 0; i < kNumGroupContexts; ++i) lens[i] = (least * kHalves[i] + 1) / 2;
}

TokenGuess guess_token(const SuffixIndex::Follower* followers, int num_followers,
                       const GroupContexts& contexts, const NgramTable::Line* const* lines,
                       int num_lines, NoiseLaw law, const int64_t* key, int64_t position) {
  Blend blend;
  Seen seen[kMaxTokens];
  for (int l = 0; l < num_lines; ++l) {
    const NgramTable::Line& line = *lines[l];
    for (int i = 0; i < line.num; ++i) {
      const NgramTable::Entry& entry = line.entries[i];
      const float known = entry.prob != 0 ? 1.0f : 0.0f;
      seen[i] = {entry.token, static_cast<float>(entry.count), known, from_upper_half(entry.prob)};
    }
    blend.add(seen, line.num, kTableDoubt, l);
  }
  for (int c = 0; c < kNumGroupContexts; ++c) {
    if (num_followers == 0 || followers[0].match < contexts.lens[c]) break;
    int num = 0;
    for (int i = 0; i < num_followers && followers[i].match >= contexts.lens[c]; ++i) {
      const SuffixIndex::Follower& f = followers[i];
      int at = 0;
      while (at < num && seen[at].token != f.token) ++at;
      if (at == num) {
        if (num == kMaxTokens) break;
        seen[num++] = {f.token, 0.0f, 0.0f, 0.0f};
      }
      seen[at].count += 1.0f;
      if (!std::isnan(f.logprob)) {
        seen[at].known += 1.0f;
        seen[at].sum += std::exp(f.logprob);
      }
    }
    blend.add(seen, num, kGroupDoubt, NgramTable::kNumOrders + c);
  }
  return blend.best(law, key, position);
}

}  // namespace spec_rollout
