#include "drafting/history_drafter.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "cpu/parallel.h"
#include "drafting/token_guess.h"
#include "spec_rollout/check.h"

namespace spec_rollout {
namespace {

constexpr int kMaxFollowers = 16;

// A draft's token as likely as this is proposed without looking for another.
constexpr double kSure = 0.9;

// The policy moves, and a rollout enters and leaves known text: old tests count for less.
constexpr double kRequestMemory = 24.0;  // tests
constexpr double kRequestWeight =
    8.0;  // tests of its own after which a request's share counts half

// A class of proposals that failed is not proposed, so not tested: after so many tokens it is half
// forgotten.
constexpr int64_t kForgetTokens = 1 << 16;

// How far what is asked of a request's proposals goes up or down by what it has to generate yet:
// that is a guess. And none is asked more than this, or what would pass is never tested.
constexpr double kMostFavour = 4.0;
constexpr double kMostAsked = 0.95;
constexpr int kLengthsLookedAt = 16;  // of the newest rollouts of a group

constexpr int kSlotBits = 32;

// The largest c such that values cut to c sum up to at most `total`.
int64_t even_cut(std::vector<int64_t> values, int64_t total) {
  std::sort(values.begin(), values.end());
  auto left = static_cast<int64_t>(values.size());
  for (const int64_t value : values) {
    if (value * left > total) return total / left;
    total -= value;
    --left;
  }
  return values.empty() ? 0 : values.back();
}

}  // namespace

HistoryDrafter::HistoryDrafter(const Options& options, std::shared_ptr<MatchShares> shares)
    : is_lasting_(options.is_lasting),
      history_(kMaxMatch, options.max_bytes, options.max_group_bytes),
      table_(options.table_tokens, options.max_table_lines),
      word_size_(options.is_lasting),
      contexts_(WordSize::kUnknownBits),
      by_match_(std::move(shares)) {
  if (!is_lasting_) by_match_->age();
}

const HistoryDrafter::Request& HistoryDrafter::live(int64_t request) const {
  const auto slot = static_cast<uint32_t>(request);
  if (request < 0 || slot >= requests_.size() || requests_[slot].group == nullptr ||
      requests_[slot].generation != static_cast<uint32_t>(request >> kSlotBits)) {
    fail("requests: expected live ones, got ", request);
  }
  return requests_[slot];
}

void HistoryDrafter::check_live(const int64_t* requests, int64_t count) const {
  for (int64_t i = 0; i < count; ++i) live(requests[i]);
}

int64_t HistoryDrafter::join(GroupKey group, std::vector<int32_t> stop_token_ids, int64_t tag) {
  int64_t slot = static_cast<int64_t>(requests_.size());
  if (free_slots_.empty()) {
    requests_.emplace_back();
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  Request& request = requests_[slot];
  const uint32_t generation = request.generation;
  request = {};
  request.generation = generation;
  request.group = history_.join(group);
  request.stop_token_ids = std::move(stop_token_ids);
  request.tag = tag;
  ++num_live_;
  // Its row is made when it first generates, so that history comes first.
  return static_cast<int64_t>(generation) << kSlotBits | slot;
}

void HistoryDrafter::leave(int64_t handle, bool keep) {
  Request& request = live(handle);
  history_.leave(request.group, request.row, keep, request.tag);
  const uint32_t generation = (request.generation + 1) & 0x7fffffffu;
  request = {};
  request.generation = generation;
  free_slots_.push_back(static_cast<int32_t>(handle & 0xffffffff));
  --num_live_;
}

void HistoryDrafter::add_history(const int32_t* token_ids, const float* logprobs,
                                 const int64_t* cu_lens, const GroupKey* groups,
                                 const int64_t* tags, int64_t num_rows, int num_threads) {
  const int64_t num_tokens = cu_lens[num_rows];
  for (int64_t i = 0; i < num_tokens; ++i) {
    if (token_ids[i] < 0) fail("token_ids: expected ids >= 0, got ", token_ids[i], " at ", i);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t len = cu_lens[r + 1] - cu_lens[r];
    if (len > SuffixIndex::kMaxRowTokens) {
      fail("cu_lens: expected rows of at most ", SuffixIndex::kMaxRowTokens, " tokens, got ", len,
           " in row ", r);
    }
  }
  struct Rows {
    Group* group;
    std::vector<int64_t> rows;
  };
  std::vector<Rows> work;  // by group, in the order in which they come
  std::unordered_map<GroupKey, size_t, GroupKeyHash> places;
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto [place, is_new] = places.emplace(groups[r], work.size());
    // As a live request, so that it stays until it is filled.
    if (is_new) work.push_back({history_.join(groups[r]), {}});
    work[place->second].rows.push_back(r);
  }
  cpu::parallel_for(NgramTable::kNumOrders, 1, num_threads, [&](int64_t begin, int64_t end) {
    int32_t context[NgramTable::kMaxOrder];
    for (int64_t order = begin; order < end; ++order) {
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t first = cu_lens[r];
        for (int64_t i = first; i < cu_lens[r + 1]; ++i) {
          const int32_t* last = token_ids + i - 1;
          if (i - first < NgramTable::kMaxOrder) {
            context[0] = SuffixIndex::kStart;
            std::copy(token_ids + first, token_ids + i, context + 1);
            last = context + (i - first);
          }
          table_.learn(static_cast<int>(order), table_.locate(last), token_ids[i],
                       logprobs == nullptr ? NAN : std::exp(logprobs[i]));
        }
      }
    }
  });
  cpu::parallel_for(
      static_cast<int64_t>(work.size()), 1, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; ++w) {
          Group& group = *work[w].group;
          for (const int64_t r : work[w].rows) {
            if (cu_lens[r] == cu_lens[r + 1]) continue;
            const int64_t row = group.add_row(cu_lens[r + 1] - cu_lens[r]);
            for (int64_t i = cu_lens[r]; i < cu_lens[r + 1]; ++i) {
              group.index.append(row, token_ids[i], logprobs == nullptr ? NAN : logprobs[i]);
            }
            group.keep(static_cast<int32_t>(row), tags == nullptr ? Group::kNoTag : tags[r]);
          }
        }
      });
  for (const Rows& rows : work) {
    history_.leave(rows.group, Group::kNoRow, false, Group::kNoTag);
  }
  const bool is_due = word_size_.add(token_ids, num_tokens);
  // For one call this is all that there will be, however little.
  if (num_tokens > 0 && (is_due || !is_lasting_)) {
    contexts_ = GroupContexts(word_size_.measure());
  }
  learned(num_tokens);
}

void HistoryDrafter::learned(int64_t num_tokens) {
  if (is_lasting_ && num_learned_ / kForgetTokens != (num_learned_ + num_tokens) / kForgetTokens) {
    by_match_->age();
  }
  num_learned_ += num_tokens;
}

void HistoryDrafter::follow(int64_t request, const int32_t* token_ids, const float* logprobs,
                            int64_t count) {
  Request& r = live(request);
  r.draft.assign(token_ids, token_ids + count);
  r.draft_logprobs.assign(logprobs, logprobs + count);
}

void HistoryDrafter::extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
                            const float* logprobs, const int64_t* cu_lens) {
  check_live(requests, count);
  for (int64_t i = 0; i < cu_lens[count]; ++i) {
    if (token_ids[i] < 0) fail("token_ids: expected ids >= 0, got ", token_ids[i], " at ", i);
  }
  for (int64_t i = 0; i < count; ++i) {
    Request& request = live(requests[i]);
    Group& group = *request.group;
    if (request.row < 0) request.row = group.add_row(0);
    for (int64_t k = cu_lens[i]; k < cu_lens[i + 1]; ++k) {
      if (request.num_tokens < static_cast<int64_t>(request.draft.size()) &&
          request.draft[request.num_tokens] == token_ids[k]) {
        ++request.num_followed;
      } else {
        request.draft.clear();
      }
      ++request.num_tokens;
      if (group.index.row_len(request.row) == SuffixIndex::kMaxRowTokens) {
        group.keep(static_cast<int32_t>(request.row), request.tag);
        request.row = group.add_row(0);
      }
      const NgramTable::Place place = table_.locate(group.index.last(request.row));
      const float logprob = logprobs == nullptr ? NAN : logprobs[k];
      group.index.append(request.row, token_ids[k], logprob);
      table_.learn(place, token_ids[k], logprob);
    }
    history_.grown(request.group);
  }
  if (is_lasting_ && word_size_.add(token_ids, cu_lens[count])) {
    contexts_ = GroupContexts(word_size_.measure());
  }
  learned(cu_lens[count]);
}

double HistoryDrafter::probability(int cell, const Request& request) const {
  const Share share = by_match_->share(cell);
  const double general = share.passed / share.tested;
  return (general * kRequestWeight + request.share.passed) /
         (kRequestWeight + request.share.tested);
}

double HistoryDrafter::num_left(const Request& request) const {
  const int64_t drafted = static_cast<int64_t>(request.draft.size()) - request.num_tokens;
  if (drafted > 0) return static_cast<double>(drafted);
  const Group& group = *request.group;
  int64_t sum = 0, num = 0;
  int32_t row = group.newest;
  for (int i = 0; i < kLengthsLookedAt && row != Group::kNoRow; ++i, row = group.kept[row].older) {
    const int64_t left = group.index.row_len(row) - request.num_tokens;
    if (left > 0) {
      sum += left;
      ++num;
    }
  }
  return num == 0 ? 0.0 : static_cast<double>(sum) / static_cast<double>(num);
}

std::vector<double> HistoryDrafter::least_probabilities(const int64_t* requests, int64_t count,
                                                        double of_mean) const {
  std::vector<double> left(count), least(count, of_mean);
  double sum = 0.0;
  int64_t num = 0;
  for (int64_t i = 0; i < count; ++i) {
    left[i] = num_left(live(requests[i]));
    sum += left[i];
    num += left[i] > 0.0;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (left[i] <= 0.0) continue;  // nothing is known
    const double mean = sum / static_cast<double>(num);
    const double asked = of_mean * std::clamp(mean / left[i], 1.0 / kMostFavour, kMostFavour);
    least[i] = std::min(asked, std::max(of_mean, kMostAsked));
  }
  return least;
}

void HistoryDrafter::propose_one(Request& request, int64_t limit, const Noise& noise,
                                 double min_probability, std::vector<int32_t>& context,
                                 int32_t* out, int64_t* num_own) const {
  const SuffixIndex& group = request.group->index;
  const std::vector<int32_t>& stops = request.stop_token_ids;
  context.resize(kMaxMatch + 1 + limit);
  int64_t end = group.context(request.row, context.data());
  double likely = 1.0;
  bool is_own = noise.key != nullptr && !request.draft.empty();
  for (int64_t k = 0; k < limit; ++k) {
    int32_t token = -1;
    int cell = 0;
    double passes = 0.0;
    const int64_t at = request.num_tokens + k;
    is_own = is_own && at < static_cast<int64_t>(request.draft.size());
    if (is_own) {
      token = request.draft[at];
      const double logprob = request.draft_logprobs[at];
      const double score = logprob + noise_of(noise_law_, *noise.key, noise.position + k, token);
      // All other tokens' best is below `score` with this probability.
      cell = MatchShares::cell(MatchShares::kOwnDraft,
                               std::exp(std::expm1(logprob) * std::exp(-score)));
      passes = probability(cell, request);
    }
    if (passes < kSure) {
      const int32_t* last = context.data() + end - 1;
      const NgramTable::Place place = table_.locate(last);
      SuffixIndex::Follower followers[kMaxFollowers];
      const int num_followers =
          group.followers(last, kMaxFollowers, followers, &request.num_visits);
      const NgramTable::Line* lines[NgramTable::kNumOrders];
      const int num_lines = table_.find(place, lines);
      const TokenGuess guess = guess_token(followers, num_followers, contexts_, lines, num_lines,
                                           noise_law_, noise.key, noise.position + k);
      if (guess.token >= 0 && guess.token != token) {
        const int other = MatchShares::cell(guess.source, guess.chance);
        const double other_passes = probability(other, request);
        if (other_passes > passes) {
          token = guess.token;
          cell = other;
          passes = other_passes;
          is_own = false;
        }
      }
    }
    if (token < 0 || std::find(stops.begin(), stops.end(), token) != stops.end()) return;
    likely *= passes;
    if (likely < min_probability) return;
    *num_own += is_own;
    request.proposed.push_back(static_cast<int16_t>(cell));
    request.passes.push_back(static_cast<float>(likely));
    out[k] = token;
    context[end++] = token;
  }
}

int64_t HistoryDrafter::propose(const int64_t* requests, const int64_t* limits, const int64_t* keys,
                                const int64_t* positions, const bool* with_noise, int64_t count,
                                double min_probability, bool favours_longest, int64_t max_total,
                                int num_threads, int32_t* out, int64_t* out_lens, int64_t* own_lens,
                                float* expected) {
  check_live(requests, count);
  // Every request writes to room of its own first.
  std::vector<int64_t> starts(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + std::max<int64_t>(0, limits[i]);
  const std::vector<double> least = favours_longest
                                        ? least_probabilities(requests, count, min_probability)
                                        : std::vector<double>(count, min_probability);
  cpu::parallel_for(count, 8, num_threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> context;
    for (int64_t i = begin; i < end; ++i) {
      Request& request = live(requests[i]);
      request.proposed.clear();
      request.passes.clear();
      out_lens[i] = own_lens[i] = 0;
      if (request.row < 0 || limits[i] <= 0) continue;
      const bool has_noise = keys != nullptr && (with_noise == nullptr || with_noise[i]);
      const Noise noise{has_noise ? keys + i : nullptr, has_noise ? positions[i] : 0};
      propose_one(request, limits[i], noise, least[i], context, out + starts[i], own_lens + i);
      out_lens[i] = static_cast<int64_t>(request.proposed.size());
    }
  });
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(out + starts[i], out_lens[i], out + total);
    total += out_lens[i];
  }
  if (total > max_total) {
    const int64_t cut = even_cut({out_lens, out_lens + count}, max_total);
    // Not even one for each: the likeliest.
    std::vector<char> has_one(count, 0);
    if (cut == 0) {
      std::vector<int64_t> order;
      for (int64_t i = 0; i < count; ++i) {
        if (out_lens[i] > 0) order.push_back(i);
      }
      const auto likelier = [&](int64_t a, int64_t b) {
        return live(requests[a]).passes[0] > live(requests[b]).passes[0];
      };
      std::stable_sort(order.begin(), order.end(), likelier);
      for (int64_t i = 0; i < max_total; ++i) has_one[order[i]] = 1;
    }
    const int32_t* from = out;
    int32_t* to = out;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t kept = std::min(out_lens[i], cut + has_one[i]);
      std::copy(from, from + kept, to);
      from += out_lens[i];
      to += kept;
      live(requests[i]).proposed.resize(kept);
      out_lens[i] = kept;
      own_lens[i] = std::min(own_lens[i], kept);
    }
    total = to - out;
  }
  for (int64_t i = 0; i < count; ++i) {
    Request& request = live(requests[i]);
    const auto first = request.passes.begin();
    expected[i] = std::accumulate(first, first + out_lens[i], 0.0f);
    num_lookup_visits_ += std::exchange(request.num_visits, 0);
  }
  return total;
}

void HistoryDrafter::observe(const int64_t* requests, const int64_t* accepted_lens, int64_t count) {
  check_live(requests, count);
  for (int64_t i = 0; i < count; ++i) {
    Request& request = live(requests[i]);
    // Tokens after the first that failed were not tested.
    const auto tested =
        std::min<int64_t>(accepted_lens[i] + 1, static_cast<int64_t>(request.proposed.size()));
    for (int64_t k = 0; k < tested; ++k) {
      by_match_->observe(request.proposed[k], k < accepted_lens[i]);
      request.share.add(k < accepted_lens[i], 1.0, kRequestMemory);
    }
    request.proposed.clear();
  }
}

std::pair<const Group*, int64_t> HistoryDrafter::generated(int64_t handle) const {
  const Request& request = live(handle);
  if (request.row == Group::kNoRow) return {nullptr, Group::kNoRow};
  return {request.group, request.row};
}

std::pair<const Group*, int64_t> HistoryDrafter::recall(GroupKey key, int64_t tag) const {
  const Group* group = history_.find(key);
  if (group == nullptr) return {nullptr, Group::kNoRow};
  int32_t row = group->newest;
  while (row != Group::kNoRow && group->kept[row].tag != tag) row = group->kept[row].older;
  return {row == Group::kNoRow ? nullptr : group, row};
}

bool HistoryDrafter::has_history(int64_t handle) const {
  const Request& request = live(handle);
  const SuffixIndex& index = request.group->index;
  return index.num_tokens() > (request.row < 0 ? 0 : index.row_len(request.row));
}

void HistoryDrafter::clear() {
  history_.clear();
  table_.clear();
}

int64_t HistoryDrafter::num_bytes() const {
  return static_cast<int64_t>(requests_.capacity() * sizeof(Request)) + table_.num_bytes() +
         history_.num_bytes();
}

std::vector<double> HistoryDrafter::acceptance() const { return by_match_->acceptance(); }

}  // namespace spec_rollout
