"""How well, how fast and how small history drafting is on real sibling rollouts.

    python benchmarks/bench_drafting.py --data DATA.jsonl

DATA has one JSON object per line with `responses`, several sampled solutions to one problem. Each
response in turn is "generated" again with the others (and, in half of the rows, a perturbed copy of
itself) as history: a step proposes what followed the longest suffix match, the proposal passes as
far as it equals the response, and one more token is drawn. The tokenizer (BPE) is trained on the
responses themselves.

`HistoryDrafter` is what engines use on top of the index: it also learns from the other problems,
and proposes what is likely enough to pass. It regenerates one response of every problem at a time,
all problems side by side; without noise and log-probs, of which such data has none. A `Drafter`,
which outlives its requests, serves all responses in turn within a bound of bytes.

Where `arctic_inference.suffix_decoding` can be imported (Snowflake's suffix tree, another way to
find proposals, by frequency instead of recency), it replays the same; only its compiled tree is
needed, not vLLM.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _common import Results, measure, parser

from spec_rollout import _C
from spec_rollout.drafting import Drafter, HistoryDrafter
from spec_rollout.keys import prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import History

MAX_MATCH = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """How much is proposed: up to `max_tokens`, and at most `tokens_per_match` for each matched
    token."""

    min_match: int
    max_tokens: int
    tokens_per_match: float

    @property
    def adaptive(self) -> bool:
        return self.tokens_per_match < self.max_tokens


def load_groups(path: Path, vocab_size: int, limit: int | None) -> list[list[list[int]]]:
    """Token ids [group][sample][token] under a BPE trained on the responses."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with path.open(encoding="utf-8") as lines:
        groups = [json.loads(line)["responses"] for line in lines][:limit]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    tokenizer.train_from_iterator((text for group in groups for text in group), trainer)
    return [[tokenizer.encode(text).ids for text in group] for group in groups]


def perturbed(tokens: list[int], rng: random.Random) -> list[int]:
    """The response as an older policy might have put it: one token in twenty is another one of the
    same text."""
    return [rng.choice(tokens) if rng.random() < 0.05 else token for token in tokens]


class OurIndex:
    """One generating response, and the others as history."""

    name = "SuffixIndex"

    def __init__(self, history: Sequence[Sequence[int]], capacity: int) -> None:
        self._index = _C.SuffixIndex(MAX_MATCH)
        for other in history:
            self._index.extend(self._index.add_row(len(other)), other)
        self._row = self._index.add_row(capacity)

    def propose(self, policy: Policy) -> list[int]:
        return self._index.propose(
            self._row, policy.max_tokens, policy.min_match, policy.tokens_per_match
        )[0]

    def extend(self, tokens: Sequence[int]) -> None:
        self._index.extend(self._row, tokens)

    @property
    def num_bytes(self) -> int:
        return self._index.num_bytes


class ArcticTree:
    """The same with Snowflake's suffix tree, as its cache class uses it."""

    name = "Arctic suffix tree"

    def __init__(self, history: Sequence[Sequence[int]], capacity: int) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache = SuffixDecodingCache(MAX_MATCH)
        for number, other in enumerate(history):
            self._cache.start_request(number, [])
            self._cache.add_active_response(number, list(other))
            self._cache.stop_request(number)
        self._request = len(history)
        self._cache.start_request(self._request, [])
        self._tokens: list[int] = []

    def propose(self, policy: Policy) -> list[int]:
        if not self._tokens:
            return []
        draft = self._cache.speculate(
            self._request,
            self._tokens[-MAX_MATCH:],
            max_spec_tokens=policy.max_tokens,
            max_spec_factor=policy.tokens_per_match,
            min_token_prob=0.0,
        )
        return draft.token_ids if draft.match_len >= policy.min_match else []

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        self._cache.add_active_response(self._request, list(tokens))

    @property
    def num_bytes(self) -> int:
        return self._cache._global_tree.estimate_memory()


Index = type[OurIndex] | type[ArcticTree]


def replay(
    groups: list[list[list[int]]], policy: Policy, own: bool, kind: Index = OurIndex
) -> dict[str, float]:
    """Steps and computed tokens of regenerating every response with its group as history."""
    steps = computed = tokens = longest = longest_steps = 0
    rng = random.Random(0)
    for group in groups:
        group_steps = 0
        for sample, response in enumerate(group):
            history = [other for i, other in enumerate(group) if i != sample]
            if own:
                history.append(perturbed(response, rng))
            index = kind(history, len(response))
            position = row_steps = 0
            while position < len(response):
                proposal = index.propose(policy)
                count = 0
                for token, truth in zip(proposal, response[position:], strict=False):
                    if token != truth:
                        break
                    count += 1
                count = min(count + 1, len(response) - position)
                index.extend(response[position : position + count])
                position += count
                computed += 1 + len(proposal)
                row_steps += 1
            steps += row_steps
            tokens += len(response)
            group_steps = max(group_steps, row_steps)
        longest += max(map(len, group))
        longest_steps += group_steps
    return {
        "tokens_per_step": round(tokens / steps, 3),
        "computed_per_output": round(computed / tokens, 3),
        "longest_rollout_steps_ratio": round(longest / longest_steps, 3),
    }


def replay_drafter(
    groups: list[list[list[int]]], least: float, max_tokens: int, own: bool
) -> dict[str, float]:
    """As `replay`, with proposals that pass with a probability of at least `least`."""
    steps = computed = tokens = drafter_ns = 0
    longest = np.zeros((len(groups), 2), np.int64)  # tokens and steps
    rng = random.Random(0)
    for sample in range(max(map(len, groups))):
        live = [g for g, group in enumerate(groups) if sample < len(group)]
        rows = [(g, row) for g in live for i, row in enumerate(groups[g]) if i != sample]
        if own:
            rows += [(g, perturbed(groups[g][sample], rng)) for g in live]
        drafter = HistoryDrafter(
            History(
                torch.tensor([t for _, row in rows for t in row], dtype=torch.int32),
                cu_lens_from(torch.tensor([len(row) for _, row in rows])),
                torch.tensor([g for g, _ in rows]),
                torch.tensor(live),
            )
        )
        responses = [np.array(groups[g][sample], np.int32) for g in live]
        lens = np.array([response.size for response in responses])
        positions, row_steps = np.zeros_like(lens), np.zeros_like(lens)
        given = np.ones_like(lens)
        running = np.flatnonzero(lens)
        while running.size:
            new = np.minimum(given[running], lens[running] - positions[running])
            pieces = [
                responses[r][positions[r] : positions[r] + n]
                for r, n in zip(running, new, strict=True)
            ]
            row_steps[running] += 1
            positions[running] += new
            computed += running.size
            start = time.perf_counter_ns()
            drafter.extend(running, np.concatenate(pieces), new)
            drafter_ns += time.perf_counter_ns() - start
            running = running[positions[running] < lens[running]]
            limits = np.full(running.size, max_tokens)
            start = time.perf_counter_ns()
            proposals = drafter.propose(running, limits, least)
            drafter_ns += time.perf_counter_ns() - start
            computed += proposals.token_ids.size
            ends = np.cumsum(proposals.lens)
            passed = np.zeros_like(running)
            for i, (r, end, n) in enumerate(zip(running, ends, proposals.lens, strict=True)):
                truth = responses[r][positions[r] : positions[r] + n]
                differs = np.flatnonzero(proposals.token_ids[end - n : end][: truth.size] != truth)
                passed[i] = differs[0] if differs.size else truth.size
            drafter.observe(running, passed)
            given[running] = passed + 1
        steps += int(row_steps.sum())
        tokens += int(lens.sum())
        longest[live] = np.maximum(longest[live], np.stack([lens, row_steps], axis=1))
    return {
        "tokens_per_step": round(tokens / steps, 3),
        "computed_per_output": round(computed / tokens, 3),
        "longest_rollout_steps_ratio": round(float(longest[:, 0].sum() / longest[:, 1].sum()), 3),
        "drafter_nanoseconds_per_token": round(drafter_ns / tokens, 1),
    }


def speed(groups: list[list[list[int]]], results: Results, kinds: Sequence[Index]) -> None:
    """Time of append and lookup as a generating row does them, and memory, over whole groups."""
    num_tokens = sum(len(response) for group in groups for response in group)
    policy = Policy(1, 8, 8.0)

    def append_and_look_up(kind: Index) -> int:
        num_bytes = 0
        for group in groups:
            index = kind(group[:-1], len(group[-1]))
            for token in group[-1]:
                index.extend((token,))
                index.propose(policy)
            num_bytes += index.num_bytes
        return num_bytes

    num_generated = sum(len(group[-1]) for group in groups)

    def build(kind: Index) -> None:
        for group in groups:
            kind(group[:-1], 0)

    for kind in kinds:
        num_bytes = append_and_look_up(kind)
        built = measure(lambda kind=kind: build(kind), repeats=5, warmup=1)
        both = measure(lambda kind=kind: append_and_look_up(kind), repeats=5, warmup=1)
        results.add(
            f"{kind.name}, build",
            timing=built,
            shape={"tokens": num_tokens - num_generated, "groups": len(groups)},
            nanoseconds_per_token=round(built.p50 / (num_tokens - num_generated) * 1e9, 1),
        )
        results.add(
            f"{kind.name}, build, then append and propose token by token",
            timing=both,
            shape={"tokens": num_tokens, "groups": len(groups)},
            # What generating costs alone: the history was there before.
            nanoseconds_per_token=round((both.p50 - built.p50) / num_generated * 1e9, 1),
            bytes_per_token=round(num_bytes / num_tokens, 2),
        )


def turnover(groups: list[list[list[int]]], results: Results) -> None:
    """Requests that come to a `Drafter` and go, within a bound that forgets most of them.

    Sixty-four at a time, each extended and looked up token by token; the first tenth of the
    requests, when little is there yet, beside the last tenth.
    """
    requests = [(g, row) for _ in range(2) for g, group in enumerate(groups) for row in group]
    random.Random(0).shuffle(requests)
    keys = [prompt_key([g]) for g in range(len(groups))]
    drafter = Drafter(max_bytes=2_000_000, max_group_bytes=40_000)
    spent: list[tuple[int, int]] = []  # nanoseconds and tokens of each 64 requests
    for first in range(0, len(requests), 64):
        batch = requests[first : first + 64]
        rows = [np.array(row, np.int32) for _, row in batch]
        start = time.perf_counter_ns()
        handles = np.array([drafter.join(keys[g]) for g, _ in batch])
        nanoseconds = time.perf_counter_ns() - start
        for position in range(max(map(len, rows))):
            live = np.flatnonzero([position < row.size for row in rows])
            ids = np.array([rows[i][position] for i in live], np.int32)
            requests_now, ones = handles[live], np.ones(live.size, np.int64)
            start = time.perf_counter_ns()
            drafter.extend(requests_now, ids, ones)
            drafter.propose(requests_now, ones, 0.2)
            nanoseconds += time.perf_counter_ns() - start
        start = time.perf_counter_ns()
        for handle in handles.tolist():
            drafter.leave(handle)
        nanoseconds += time.perf_counter_ns() - start
        spent.append((nanoseconds, sum(row.size for row in rows)))
    info = drafter.info()
    tenth = max(len(spent) // 10, 1)
    for name, part in (("first", spent[:tenth]), ("last", spent[-tenth:])):
        total, tokens = map(sum, zip(*part, strict=True))
        results.rows.append(
            {
                "op": f"Drafter, requests that come and go, {name} tenth",
                "shape": {"requests": len(requests), "groups": len(groups)},
                "nanoseconds_per_token": round(total / tokens, 1),
                "bytes_per_token": round(info.history_bytes / info.num_tokens, 2),
                "evicted_groups": info.num_evicted_groups,
                "evicted_sequences": info.num_evicted_sequences,
            }
        )
        print(results.rows[-1], flush=True)


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, help="JSON lines with `responses`")
    options.add_argument("--vocab-size", type=int, default=16_000)
    args = options.parse_args()
    if args.data is None or not args.data.is_file():
        print(f"skipped: --data: expected a JSON lines file of sibling responses, got {args.data}")
        return 0
    groups = load_groups(args.data, args.vocab_size, 5 if args.quick else None)
    results = Results("drafting", args.out)
    kinds: list[Index] = [OurIndex]
    if importlib.util.find_spec("arctic_inference") is not None:
        kinds.append(ArcticTree)
    else:
        print("arctic_inference: not installed, left out")
    speed(groups, results, kinds)
    turnover(groups, results)
    lengths = (8,) if args.quick else (4, 8, 16, 32)
    policies = [
        Policy(min_match, max_tokens, per_match)
        for min_match in (1, 2, 3, 4)
        for max_tokens in lengths
        for per_match in (float(max_tokens), 2.0)
    ]
    for own, policy, kind in itertools.product((False, True), policies, kinds):
        outcome = replay(groups, policy, own, kind)
        results.rows.append(
            {
                "op": "history drafting",
                "index": kind.name,
                "history": "siblings and own perturbed" if own else "siblings",
                "min_match": policy.min_match,
                "max_tokens": policy.max_tokens,
                "adaptive": policy.adaptive,
                **outcome,
            }
        )
        print(results.rows[-1], flush=True)
    for own, least in itertools.product((False, True), (0.1, 0.2, 0.3, 0.5)):
        outcome = replay_drafter(groups, least, 16, own)
        results.rows.append(
            {
                "op": "history drafting",
                "index": "HistoryDrafter",
                "history": "siblings and own perturbed" if own else "siblings",
                "min_probability": least,
                "max_tokens": 16,
                **outcome,
            }
        )
        print(results.rows[-1], flush=True)
    results.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
