#include "drafting/match_shares.h"

#include <algorithm>
#include <cmath>

namespace spec_rollout {
namespace {

// What is believed before anything was tested, worth as many tests as this: longer matches are
// better ones, and the chance is not to be trusted all the way.
constexpr double kPriorTests = 4.0;
double prior(int source, double chance) {
  if (source == MatchShares::kOwnDraft) return 0.5 + 0.5 * chance;
  return (1.0 - 0.6 / (3.0 + source)) * (0.1 + 0.9 * chance);
}

constexpr double kMatchMemory = 4096.0;  // tests

}  // namespace

void Share::add(bool has_passed, double weight, double memory) {
  if (tested >= memory) {
    passed *= 0.5;
    tested *= 0.5;
  }
  passed += has_passed ? 1.0 : 0.0;
  tested += weight;
}

int MatchShares::cell(int source, double chance) {
  // Finer towards 1, where long proposals are decided: even steps of the square root of 1 - chance.
  const double left = std::sqrt(std::max(0.0, 1.0 - chance));
  return source * kChances + std::min(static_cast<int>(left * kChances), kChances - 1);
}

// What has not been tested itself is believed to fare as other tokens of its source do.
double MatchShares::believed(int cell) const {
  const double left = (cell % kChances + 0.5) / kChances;
  const double first = prior(cell / kChances, 1.0 - left * left);
  const Share& others = classes_[cell / kChances];
  return std::min(1.0, first * (others.passed + kPriorTests) / (others.tested + kPriorTests));
}

Share MatchShares::share(int cell) const {
  return {learned_[cell].passed + believed(cell) * kPriorTests,
          learned_[cell].tested + kPriorTests};
}

void MatchShares::observe(int cell, bool passed) {
  const double left = (cell % kChances + 0.5) / kChances;
  classes_[cell / kChances].add(passed, prior(cell / kChances, 1.0 - left * left), kMatchMemory);
  learned_[cell].add(passed, 1.0, kMatchMemory);
}

std::vector<double> MatchShares::acceptance() const {
  std::vector<double> shares;
  for (int cell = 0; cell < kNumCells; ++cell) {
    const Share s = share(cell);
    shares.push_back(s.passed / s.tested);
  }
  return shares;
}

void MatchShares::age() {
  for (std::vector<Share>* shares : {&learned_, &classes_}) {
    for (Share& share : *shares) share = {0.5 * share.passed, 0.5 * share.tested};
  }
}

}  // namespace spec_rollout
