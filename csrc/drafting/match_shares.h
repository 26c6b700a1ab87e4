// How proposed tokens fared, and so how far to trust the next ones.
#pragma once

#include <cstdint>
#include <vector>

#include "drafting/token_guess.h"

namespace spec_rollout {

// How many of some tests passed; decayed counts.
struct Share {
  double passed = 0.0, tested = 0.0;

  // Old tests count for less: counts are halved at `memory` tests. `weight`: what was expected.
  void add(bool has_passed, double weight, double memory);
};

// How proposed tokens fared, by the context that they had been seen in and by the chance they were
// given. Outlives the drafters of single rollout calls, so that what one call learned the next one
// knows.
class MatchShares {
 public:
  static constexpr int kChances = 16;
  // Instead of a context: the token that the request's own draft has here.
  static constexpr int kOwnDraft = kNumSources;

  MatchShares() : learned_(kNumCells), classes_(kNumSources + 1) {}

  // The class of a token proposed from a source (TokenGuess, or kOwnDraft), of which the samples
  // seen and the noise say that it passes with this chance.
  static int cell(int source, double chance);
  // Share that passed, drawn towards what is believed before any test.
  Share share(int cell) const;
  void observe(int cell, bool passed);
  // Share that passed of every class.
  std::vector<double> acceptance() const;
  // A call begins: what was learned counts half. A class that is not proposed any more, because it
  // failed, is so believed in again after some calls.
  void age();

 private:
  static constexpr int kNumCells = (kNumSources + 1) * kChances;
  double believed(int cell) const;

  std::vector<Share> learned_;
  // By source: tests that passed, and how many would have if prior beliefs were right.
  std::vector<Share> classes_;
};

}  // namespace spec_rollout
