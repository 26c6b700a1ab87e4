// Arithmetic on rows of logits that both back ends share: temperature, filter weights, and the
// bound that lets an argmax under Gumbel noise skip almost all of the noise.
#pragma once

#include "spec_rollout/ops.h"
#include "spec_rollout/philox.h"

namespace spec_rollout {
inline namespace SPEC_ROLLOUT_ISA {

// One row's sampling parameters. x = logit * inv_temperature; greedy rows keep inv_temperature = 1.
struct RowSampling {
  float inv_temperature = 1.0f;
  bool greedy = false;
  int64_t top_k = 0;
  float top_p = 1.0f;
};

SR_HD float row_temperature(const SamplingArgs& args, int64_t row) {
  return args.temperatures != nullptr ? args.temperatures[row] : args.temperature;
}
SR_HD int64_t row_top_k(const SamplingArgs& args, int64_t row) {
  return args.top_ks ? args.top_ks[row] : args.top_k;
}
SR_HD float row_top_p(const SamplingArgs& args, int64_t row) {
  return args.top_ps != nullptr ? args.top_ps[row] : args.top_p;
}

SR_HD bool valid_temperature(float t) { return t >= 0.0f && t < INFINITY; }
SR_HD bool valid_top_k(int64_t k) { return k >= 0; }
SR_HD bool valid_top_p(float p) { return p > 0.0f && p <= 1.0f; }

SR_HD float inverse_temperature(float t) {
#if defined(__CUDA_ARCH__)
  return t > 0.0f ? __fdiv_rn(1.0f, t) : 1.0f;
#else
  return t > 0.0f ? 1.0f / t : 1.0f;
#endif
}

// Greedy rows have no filter: it could not change the argmax.
SR_HD RowSampling row_sampling(const SamplingArgs& args, int64_t row, int64_t vocab) {
  const float t = row_temperature(args, row);
  RowSampling sampling;
  sampling.inv_temperature = inverse_temperature(t);
  sampling.greedy = !(t > 0.0f);
  if (!sampling.greedy) {
    const int64_t k = row_top_k(args, row);
    sampling.top_k = k < vocab ? k : 0;
    sampling.top_p = row_top_p(args, row);
  }
  return sampling;
}

// The best candidate of an argmax so far; of equal scores the lowest id wins, so the result does
// not depend on the order of candidates.
struct Best {
  float score = -INFINITY;
  int32_t id = -1;
};

SR_HD bool better(float score, int32_t id, const Best& best) {
  return score > best.score ||
         (score == best.score && static_cast<uint32_t>(id) < static_cast<uint32_t>(best.id));
}
SR_HD void consider(float score, int32_t id, Best& best) {
  if (better(score, id, best)) {
    best.score = score;
    best.id = id;
  }
}

// 2^x where the exact bits do not matter: terms of a log-sum-exp.
SR_HD float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// sum_v e^(x_v) of the logits y_v seen so far, x = y / temperature, as sum_v 2^(y_v * slope - c)
// with c = ref * slope rounded: one fused multiplication and addition per logit, whose rounding is
// relative to its result; and the rounding of c is the same in all terms. `ref` is one of the
// logits, and moves only when terms become large, so that no maximum is searched for. Where |c| is
// so large that it would be far from the product, differences come first. NaN or +inf among the
// logits makes the sum NaN.
constexpr float kLog2e = 1.44269504f;
constexpr float kFarExponent = 0x1p22f;
constexpr float kLargeTerms = 0x1p12f;

struct OnlineSum {
  float ref = -INFINITY;
  float sum = 0.0f;
};

SR_HD float slope_of(float inv_temperature) { return exact_mul(inv_temperature, kLog2e); }
SR_HD bool is_far(float exponent) { return fabsf(exponent) > kFarExponent; }

// The term of y: e^(x - x_ref), nearly.
SR_HD float term_of(float y, float ref, float slope) {
  const float c = exact_mul(ref, slope);
  if (is_far(c)) return fast_exp2(exact_mul(exact_sub(y, ref), slope));
  return fast_exp2(exact_fma(y, slope, -c));
}

// What terms relative to `from` are multiplied with to be relative to `to` >= from.
SR_HD float rescale(float from, float to, float slope) {
  if (from == to) return 1.0f;
  const float from_c = exact_mul(from, slope), to_c = exact_mul(to, slope);
  if (is_far(from_c) || is_far(to_c)) return fast_exp2(exact_mul(exact_sub(from, to), slope));
  return fast_exp2(exact_sub(from_c, to_c));
}

// Terms relative to a ref whose c is not far; returns their sum.
template <int kCount>
SR_HD float near_terms(const float (&y)[kCount], float slope, float c, float (&term)[kCount]) {
  for (int i = 0; i < kCount; ++i) term[i] = fast_exp2(exact_fma(y[i], slope, -c));
  float pairs[(kCount + 1) / 2];
  for (int i = 0; i < (kCount + 1) / 2; ++i) {
    pairs[i] = 2 * i + 1 < kCount ? term[2 * i] + term[2 * i + 1] : term[2 * i];
  }
  float sum = pairs[0];
  for (int i = 1; i < (kCount + 1) / 2; ++i) sum += pairs[i];
  return sum;
}

// Moves ref to the largest of these logits if that is larger, the number where one is NaN.
template <int kCount>
SR_HD void raise_ref(OnlineSum& total, const float (&y)[kCount], float slope) {
  float largest = y[0];
  for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, y[i]);
  if (largest > total.ref) {
    if (total.sum != 0.0f) total.sum *= rescale(total.ref, largest, slope);
    total.ref = largest;
  }
}

// Terms relative to whatever ref is: without one, nothing but -inf and NaN has been seen.
template <int kCount>
SR_HD float any_terms(const float (&y)[kCount], const OnlineSum& total, float slope,
                      float (&term)[kCount]) {
  float sum = 0.0f;
  for (int i = 0; i < kCount; ++i) {
    const bool none = y[i] == -INFINITY && total.ref == -INFINITY;
    term[i] = none ? 0.0f : term_of(y[i], total.ref, slope);
    sum += term[i];
  }
  return sum;
}

// Adds logits, whatever they are; gives their terms relative to the new ref and returns their sum.
template <int kCount>
SR_HD float add_to_sum(OnlineSum& total, const float (&y)[kCount], float slope,
                       float (&term)[kCount]) {
  const float c = exact_mul(total.ref, slope);
  float group = INFINITY;
  if (!is_far(c)) group = near_terms(y, slope, c, term);
  if (!(group <= kLargeTerms)) {
    raise_ref(total, y, slope);
    group = any_terms(y, total, slope, term);
  }
  total.sum += group;
  return group;
}

SR_HD OnlineSum merge_sums(const OnlineSum& a, const OnlineSum& b, float slope) {
  OnlineSum merged;
  merged.ref = fmaxf(a.ref, b.ref);
  merged.sum =
      a.sum * rescale(a.ref, merged.ref, slope) + b.sum * rescale(b.ref, merged.ref, slope);
  return merged;
}

// A good row has about 1, or more, of its ref in the sum. And x of the ref is a number: the sum is
// made of logits, and says nothing of scores that are all infinite, none above the other.
SR_HD bool valid_sum(const OnlineSum& total, float inv_temperature) {
  return total.sum >= 0.25f && total.sum < INFINITY &&
         fabsf(exact_mul(total.ref, inv_temperature)) < INFINITY;
}

// Log-prob of y under total; not above 0 by the roundings of terms and c, and 0 where the sum is
// the term of y alone: below it by those roundings, a lone token could be rejected, and there would
// be none to draw in its place.
SR_HD float logprob_of(float y, const OnlineSum& total, float slope) {
  if (term_of(y, total.ref, slope) == total.sum) return 0.0f;
  const float c = exact_mul(total.ref, slope);
  const double wide = static_cast<double>(slope);
  const double exponent = is_far(c)
                              ? (static_cast<double>(y) - static_cast<double>(total.ref)) * wide
                              : static_cast<double>(y) * wide - static_cast<double>(c);
  const double logprob = exponent * 0.6931471805599453 - log(static_cast<double>(total.sum));
  return static_cast<float>(logprob > 0.0 ? 0.0 : logprob);
}

// No Gumbel noise is above this: a group's smallest uniform is 2^-30, and -ln(2^-30 / 8) = 22.88.
constexpr float kMaxGumbel = 22.9f;

// An upper bound of the noise of all tokens of a group, within 0.11 of it where noise is large,
// without a logarithm. With v the uniform of the bits, the smallest exponential is -ln(1 - v) / 8
// >= v / 8; and the bits of a float read as a number are a piecewise linear log2 that is never
// above the true one. 1e-4 covers all roundings. Because float addition is monotonic, x +
// group_bound(bits) < best means x + noise < best.
SR_HD float group_bound(uint32_t group_bits) {
  const float v = exact_fma(static_cast<float>(group_bits >> 3), 0x1p-29f, 0x1p-30f);
  const int32_t log2_v = static_cast<int32_t>(float_bits(v));
  return exact_fma(static_cast<float>(log2_v), -0x1.62e43p-24f, 88.02969193f + 2.07944154f + 1e-4f);
}

// The same question without conversions between integers and floats, which a GPU does at an eighth
// of the rate of other instructions, where the term e^(x - ref) of a sum is at hand: x + noise can
// reach `bound` only if exponential <= e^(x - bound) = term * e^(ref - bound), and an exponential
// -ln(1 - v) is no smaller than its uniform v. The margin covers the roundings of score, noise and
// terms. Infinite while ref is far above the bound: terms may have underflowed then, and every
// token passes. A bound of +inf has gap -inf: nothing reaches it.
SR_HD float reach_gap(float ref, float bound) {
  if (bound == INFINITY) return -INFINITY;
  return ref - (bound - fabsf(bound) * 0x1p-20f - 2e-3f);
}
SR_HD float reach_scale(float gap) { return gap <= 40.0f ? fast_exp2(gap * kLog2e) : INFINITY; }

// Whether any token of a group may reach the bound; terms is the sum of its tokens' terms (or of
// some of them, if it is they that are asked for). Compares 1 + uniform, cut to 23 bits, with 1 +
// what it must not exceed; NaN (0 * inf) passes.
SR_HD bool group_may_reach(uint32_t group_bits, float terms, float scale) {
  return !(float_from_bits(0x3f800000u + (group_bits >> 9)) >
           exact_fma(terms, scale * static_cast<float>(kNoiseGroup), 1.0f));
}

// Whether one token may, given all of its noise.
SR_HD bool token_may_reach(uint32_t group_bits, uint32_t bits, bool leads, float term,
                           float scale) {
  const float least = float_from_bits(0x3f800000u + (group_bits >> 9)) - 1.0f;
  const float above = float_from_bits(0x3f800000u + (bits >> 9)) - 1.0f;
  const float least_exponential = least * (1.0f / kNoiseGroup) + (leads ? 0.0f : above);
  return !(least_exponential > term * scale);
}

// The smallest exponential there is, and a little less: no token of a vector reaches the bound
// whose terms sum to less than this over scale.
constexpr float kLeastExponential = 0x1p-33f * 0.99f;

// e^x for x <= 0, the same bits everywhere, within 2 units in the last place; 0 below -86.
// Polynomial of Cephes' expf (S. Moshier).
SR_HD float exact_exp(float x) {
  if (!(x >= -86.0f)) return 0.0f;
  const float shifted = exact_fma(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const float n = exact_sub(shifted, 12582912.0f);
  float f = exact_fma(n, -0.693359375f, x);
  f = exact_fma(n, 2.12194440e-4f, f);
  float p = 1.9875691500e-4f;
  p = exact_fma(p, f, 1.3981999507e-3f);
  p = exact_fma(p, f, 8.3334519073e-3f);
  p = exact_fma(p, f, 4.1665795894e-2f);
  p = exact_fma(p, f, 1.6666665459e-1f);
  p = exact_fma(p, f, 5.0000001201e-1f);
  p = exact_fma(exact_mul(p, f), f, f);
  p = exact_add(p, 1.0f);
  return float_from_bits(float_bits(p) + (float_bits(shifted) << 23));
}

// Weight of a token in the top-p sum: e^(x - max) in fixed point. Sums of integers do not depend on
// their order, so the kept set is the same on every back end. Vocabularies below 2^23 cannot
// overflow.
constexpr int64_t kMaxFilterVocab = int64_t{1} << 23;
constexpr float kFilterRange = 28.0f;  // 2^-40 = e^-27.7: weights further below the maximum are 0
SR_HD uint64_t fixed_point_weight(float exp_of_difference) {
  const float scaled = exact_mul(exp_of_difference, 0x1p40f);
#if defined(__CUDA_ARCH__)
  return __float2ull_rz(scaled);
#else
  return static_cast<uint64_t>(static_cast<int64_t>(scaled));
#endif
}
SR_HD uint64_t top_p_weight(float x, float max) {
  return fixed_point_weight(exact_exp(exact_sub(x, max)));
}

// What the kept tokens' weights must reach, out of `total`.
SR_HD uint64_t top_p_target(uint64_t total, float top_p) {
#if defined(__CUDA_ARCH__)
  const double scaled = __dmul_rn(static_cast<double>(total), static_cast<double>(top_p));
#else
  const double scaled = static_cast<double>(total) * static_cast<double>(top_p);
#endif
  const uint64_t target = static_cast<uint64_t>(ceil(scaled));
  return target < 1 ? 1 : (target > total ? total : target);
}

// Floats to integers of the same order (-0 below +0), and back.
SR_HD uint32_t ordered_key(float x) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}
SR_HD float from_ordered_key(uint32_t key) {
  return float_from_bits((key & 0x80000000u) ? key & 0x7fffffffu : ~key);
}

}  // namespace SPEC_ROLLOUT_ISA
}  // namespace spec_rollout
