// The arithmetic that host and device code share, as tests call it: what a kernel computes of one
// element or one row of logits, without a GPU.
#include <pybind11/numpy.h>

#include <algorithm>
#include <vector>

#include "convert.h"
#include "spec_rollout/acceptance.h"
#include "spec_rollout/logits.h"

namespace spec_rollout::python {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Words = py::array_t<uint32_t, py::array::c_style>;

// The sum of a row as `num_threads` threads of a block take it, groups of eight in turn, merged by
// a tree; -> (log-prob of each token, whether the sum is one of usable logits).
py::tuple online_logprobs(const Floats& logits, float inv_temperature, int num_threads) {
  constexpr int kGroup = 8;
  const float* y = logits.data();
  const py::ssize_t vocab = logits.size();
  const float slope = slope_of(inv_temperature);
  std::vector<OnlineSum> sums(static_cast<size_t>(num_threads));
  for (py::ssize_t first = 0, group = 0; first < vocab; first += kGroup, ++group) {
    float values[kGroup], term[kGroup];
    for (int i = 0; i < kGroup; ++i) values[i] = first + i < vocab ? y[first + i] : -INFINITY;
    add_to_sum(sums[static_cast<size_t>(group % num_threads)], values, slope, term);
  }
  for (size_t step = 1; step < sums.size(); step *= 2) {
    for (size_t i = 0; i + step < sums.size(); i += 2 * step) {
      sums[i] = merge_sums(sums[i], sums[i + step], slope);
    }
  }
  Floats logprobs(vocab);
  for (py::ssize_t i = 0; i < vocab; ++i) {
    logprobs.mutable_data()[i] = logprob_of(y[i], sums[0], slope);
  }
  return py::make_tuple(logprobs, valid_sum(sums[0], inv_temperature));
}

// Per token with random bits, whether its score may reach `bound`, as a block asks that holds terms
// relative to the logit `ref`: first of its group, then of itself. Token i has bits[i] of its own
// and group_bits[i / 8] of its group.
py::array_t<bool> may_reach_bound(const Floats& logits, const Words& group_bits, const Words& bits,
                                  float inv_temperature, float ref, float bound) {
  const float slope = slope_of(inv_temperature);
  const float scale = reach_scale(reach_gap(exact_mul(ref, inv_temperature), bound));
  py::array_t<bool> out(logits.size());
  for (py::ssize_t first = 0; first < logits.size(); first += kNoiseGroup) {
    const py::ssize_t end = std::min<py::ssize_t>(first + kNoiseGroup, logits.size());
    const uint32_t group = group_bits.data()[first / kNoiseGroup];
    float sum = 0.0f;
    for (py::ssize_t i = first; i < end; ++i) sum += term_of(logits.data()[i], ref, slope);
    const bool any = !(sum * scale < kLeastExponential) && group_may_reach(group, sum, scale);
    for (py::ssize_t i = first; i < end; ++i) {
      const float term = term_of(logits.data()[i], ref, slope);
      const bool leads = static_cast<int>(i - first) == leader_from_bits(group);
      out.mutable_data()[i] = any && token_may_reach(group, bits.data()[i], leads, term, scale);
    }
  }
  return out;
}

}  // namespace

void bind_arithmetic(py::module_& module) {
  module.def("online_logprobs", &online_logprobs);
  module.def("may_reach_bound", &may_reach_bound);
  module.def("philox",
             [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
               const auto out = philox4x32_10(c0, c1, c2, c3, k0, k1);
               return py::make_tuple(out.x[0], out.x[1], out.x[2], out.x[3]);
             });
  module.def("accept_bits",
             [](int64_t key, int64_t position) { return accept_bits(NoiseKey(key), position); });
  module.def("uniform_from_bits", &uniform_from_bits);
  module.def("gumbel_from_bits", &gumbel_from_bits);
  module.def("group_bound", &group_bound);
  module.def("exact_log", &exact_log);
}

}  // namespace spec_rollout::python
