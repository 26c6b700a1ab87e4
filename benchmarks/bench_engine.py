"""The embedded engine against `model.generate`, and what a verified token costs beside a decoded
one.

The demo model, 256 prompts (64 problems, 4 samples each), the same threads:

- `generate_all`: responses of natural length, without drafts, by number of slots; the peers are
  `model.generate` with its own KV cache on batches of 64 and 256. Slots are refilled, so the engine
  gains where lengths differ.
- `generate_fixed`: 96 tokens each, no stop token: nothing to gain from refilling.
- `batch_invariance`: the same with and without it, at the best number of slots.
- `verify`: all 256 responses as drafts of an unchanged policy, all accepted. `us_per_token` is per
  token computed.
- `mixed`: drafts of a policy some steps ago, per acceptance rule; `speedup` is over the engine
  without drafts and with its best number of slots.

Every contender's tokens are checked before it is timed: greedy responses equal those of `generate`.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from _common import Results, Timing, measure, parser

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse
from spec_rollout.demo import model_dir
from spec_rollout.demo.task import MAX_RESPONSE_TOKENS, training_problems
from spec_rollout.engines import TransformersEngine
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, RolloutRequests, Rollouts, SamplingParams

NUM_PROBLEMS, NUM_SAMPLES = 64, 4
FIXED_TOKENS = 96
DRIFT = 0.004  # standard deviation of the change of every weight between draft and target policy
GENERATE_BATCHES = (64, 256)


class Bench:
    """The model, the prompts, and the two ways to run them."""

    def __init__(self, quick: bool) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model_dir()).eval()
        tokenizer = AutoTokenizer.from_pretrained(model_dir())
        self.stop = tokenizer.eos_token_id
        problems = training_problems(8 if quick else NUM_PROBLEMS)
        self.prompts = [
            tokenizer(problem.prompt)["input_ids"]
            for problem in problems
            for _ in range(NUM_SAMPLES)
        ]
        self.sampling = SamplingParams(max_tokens=MAX_RESPONSE_TOKENS, stop_token_ids=(self.stop,))
        self.slots = (32, 64) if quick else (32, 64, 128, 256)
        self.repeats = 1 if quick else 3

    def requests(self, drafts: Drafts | None = None, seed: int = 0) -> RolloutRequests:
        batch = len(self.prompts)
        generator = torch.Generator().manual_seed(seed)
        return RolloutRequests(
            torch.tensor([token for prompt in self.prompts for token in prompt], dtype=torch.int32),
            cu_lens_from(torch.tensor([len(prompt) for prompt in self.prompts])),
            torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
            Drafts.none(batch) if drafts is None else drafts,
        )

    def generate(self, batch_size: int, **options: Any) -> list[list[int]]:
        """Responses by `model.generate`, prompts left-padded."""
        pad = 0
        responses = []
        for start in range(0, len(self.prompts), batch_size):
            prompts = self.prompts[start : start + batch_size]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
            with torch.inference_mode():
                out = self.model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)
            for row in out[:, width:].tolist():
                stop = options.get("eos_token_id")
                responses.append(row[: row.index(stop) + 1] if stop in row else row)
        return responses

    def check(self) -> None:
        """Greedy responses of the engine are those of `generate`."""
        greedy = SamplingParams(temperature=0.0, max_tokens=60, stop_token_ids=(self.stop,))
        rollouts = TransformersEngine(self.model).rollout(self.requests(), greedy, NoReuse())
        expected = self.generate(64, do_sample=False, max_new_tokens=60, eos_token_id=self.stop)
        same = sum(a == b for a, b in zip(responses_of(rollouts), expected, strict=True))
        # Padding changes the rounding, which may turn a near-tie.
        if same < 0.97 * len(expected):
            sys.exit(f"greedy responses differ: {same} of {len(expected)} agree")

    def timed(self, function: Callable[[], Any]) -> tuple[Timing, Any]:
        kept = []
        timing = measure(lambda: kept.append(function()), repeats=self.repeats, warmup=1)
        return timing, kept[-1]


def responses_of(rollouts: Rollouts) -> list[list[int]]:
    ids, cu = rollouts.response_ids.tolist(), rollouts.cu_response_lens.tolist()
    return [ids[a:b] for a, b in itertools.pairwise(cu)]


def counts(rollouts: Rollouts, timing: Timing) -> dict[str, Any]:
    stats = rollouts.stats
    return {
        "response_tokens": stats.num_response_tokens,
        "tokens_per_s": round(stats.num_response_tokens / timing.p50),
        "us_per_token": round(timing.p50 / stats.num_computed_tokens * 1e6, 1),
        "computed_tokens": stats.num_computed_tokens,
        "padding_tokens": stats.num_padding_tokens,
        "engine_steps": stats.num_engine_steps,
        "decode_steps": stats.num_decode_steps,
    }


def against_generate(bench: Bench, results: Results, op: str, sampling: SamplingParams) -> int:
    """Rows of the engine by slots with `generate` as peer; returns the best number of slots."""
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    stop = sampling.stop_token_ids[0] if sampling.stop_token_ids else None
    peers, peer_tokens = {}, {}
    for batch_size in GENERATE_BATCHES:
        timing, responses = bench.timed(
            lambda size=batch_size: bench.generate(
                size, max_new_tokens=sampling.max_tokens, eos_token_id=stop, **options
            )
        )
        peers[f"generate_{batch_size}"] = timing
        peer_tokens[f"generate_{batch_size}"] = sum(map(len, responses))
    best_peer = min(peers, key=lambda name: peers[name].p50)
    rows = {}
    for slots in bench.slots:
        engine = TransformersEngine(bench.model, num_slots=slots)
        timing, rollouts = bench.timed(
            lambda engine=engine: engine.rollout(bench.requests(), sampling, NoReuse())
        )
        rows[slots] = timing.p50
        results.add(
            op,
            shape={"prompts": len(bench.prompts), "slots": slots},
            dtype="float32",
            timing=timing,
            peers=peers,
            # Sampling differs, so lengths do a little: per token is the fair ratio.
            speedup_per_token=round(
                (peers[best_peer].p50 / peer_tokens[best_peer])
                / (timing.p50 / rollouts.stats.num_response_tokens),
                3,
            ),
            peer_tokens=peer_tokens,
            **counts(rollouts, timing),
        )
    return min(rows, key=lambda slots: rows[slots])


def reuse(bench: Bench, results: Results, slots: int) -> None:
    """What drafts save: of an unchanged policy, and of one some steps ago."""
    engine = TransformersEngine(bench.model, num_slots=slots)
    old = engine.rollout(bench.requests(), bench.sampling, NoReuse())
    drafts = Drafts(old.response_ids, old.cu_response_lens, old.logprobs, old.finish_reasons == 0)
    timing, rollouts = bench.timed(
        lambda: engine.rollout(bench.requests(drafts), bench.sampling, Coupled())
    )
    assert responses_of(rollouts) == responses_of(old) or not engine.batch_invariant
    row = counts(rollouts, timing)
    results.add("verify", shape={"slots": slots}, dtype="float32", timing=timing, **row)

    target = copy.deepcopy(bench.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=DRIFT)
    engine = TransformersEngine(target, num_slots=slots)
    fresh = bench.requests(seed=2)
    plain, _ = bench.timed(lambda: engine.rollout(fresh, bench.sampling, NoReuse()))
    rules: list[tuple[AcceptanceRule, RolloutRequests]] = [
        (Lenient(0.0), bench.requests(drafts, seed=2)),
        (Lenient(0.5), bench.requests(drafts, seed=2)),
        (Coupled(), bench.requests(drafts)),  # the noise the drafts were drawn with
    ]
    for rule, requests in rules:
        timing, rollouts = bench.timed(
            lambda rule=rule, requests=requests: engine.rollout(requests, bench.sampling, rule)
        )
        stats = rollouts.stats
        results.add(
            "mixed",
            shape={"rule": str(rule), "slots": slots},
            dtype="float32",
            timing=timing,
            peers={"without_drafts": plain},
            reused_fraction=round(stats.reused_fraction, 3),
            fully_reused_fraction=round(stats.fully_reused_fraction, 3),
            verified_tokens=stats.num_verified_tokens,
            verification_seconds=round(stats.verification_seconds, 3),
            decode_seconds=round(stats.decode_seconds, 3),
            **counts(rollouts, timing),
        )


def main() -> None:
    options = parser(__doc__).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options.quick)
    bench.check()
    results = Results("engine", options.out)
    slots = against_generate(bench, results, "generate_all", bench.sampling)
    against_generate(bench, results, "generate_fixed", SamplingParams(max_tokens=FIXED_TOKENS))
    engines = {
        invariant: TransformersEngine(bench.model, num_slots=slots, batch_invariant=invariant)
        for invariant in (True, False)
    }
    timings = {
        invariant: bench.timed(
            lambda engine=engine: engine.rollout(bench.requests(), bench.sampling, NoReuse())
        )[0]
        for invariant, engine in engines.items()
    }
    results.add(
        "batch_invariance",
        shape={"slots": slots},
        dtype="float32",
        timing=timings[True],
        peers={"off": timings[False]},
        error_on=engines[True].batch_invariance_error(),
        error_off=engines[False].batch_invariance_error(),
    )
    reuse(bench, results, slots)
    results.write()


if __name__ == "__main__":
    main()
