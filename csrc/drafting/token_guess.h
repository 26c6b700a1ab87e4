// Which token comes next, judged by what followed the same words before, and by the noise it will
// be drawn with.
#pragma once

#include <cstdint>

#include "drafting/ngram_table.h"
#include "drafting/noise.h"
#include "drafting/suffix_index.h"

namespace spec_rollout {

// Where a token was seen: after how long a context of any text (by NgramTable's orders) or of the
// prompt's own rollouts.
inline constexpr int kNumGroupContexts = 7;
inline constexpr int kNumSources = NgramTable::kNumOrders + kNumGroupContexts;

struct TokenGuess {
  int32_t token = -1;   // -1: nothing is known of this context
  int32_t source = 0;   // the longest context it was seen after, 0 to kNumSources - 1
  double chance = 0.0;  // that this is the token, if the probabilities are right
};

// Lengths from which a context counts as one of the prompt's, ascending: shorter ones say less
// about what comes next than the same words anywhere, and how short that is depends on what a token
// is. `bits`: entropy of a token by itself.
struct GroupContexts {
  explicit GroupContexts(double bits);
  int lens[kNumGroupContexts];
};

// An estimate of p(next token), blended from short contexts to long ones: first those of any text
// (`table`), then those of the prompt's own rollouts (`followers`, longest match first). Each
// takes its share of the blend by how often it was seen (interpolated back-off as in PPM), and what
// it has not seen is left to the shorter ones. A token's probability after a context is the mean of
// those it was drawn with there, where they are known, else its share of the sightings.
//
// With keyed noise the token drawn is argmax(log p + noise), and the noise of every token at every
// position is known before the model has said anything: of the candidates the one is guessed that
// has the largest log p + noise, and its lead over the next says how sure that is. `key` null: no
// noise, the likeliest token.
TokenGuess guess_token(const SuffixIndex::Follower* followers, int num_followers,
                       const GroupContexts& contexts, const NgramTable::Line* const* lines,
                       int num_lines, NoiseLaw law, const int64_t* key, int64_t position);

}  // namespace spec_rollout
