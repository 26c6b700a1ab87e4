"""How well, how fast and how small history drafting is on real sibling rollouts.

    python benchmarks/bench_drafting.py --data DATA.jsonl

DATA has one JSON object per line with `responses`, several sampled solutions to one problem. Each response in turn is
"generated" again with the others (and, in half of the rows, a perturbed copy of itself) as history: a step proposes what
followed the longest suffix match, the proposal passes as far as it equals the response, and one more token is drawn.
The tokenizer (BPE) is trained on the responses themselves.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from _common import Results, measure, parser

from spec_rollout import _C

MAX_MATCH = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """How much is proposed: up to `max_tokens`, and at most `tokens_per_match` for each matched token."""

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
    """The response as an older policy might have put it: one token in twenty is another one of the same text."""
    return [rng.choice(tokens) if rng.random() < 0.05 else token for token in tokens]


def replay(groups: list[list[list[int]]], policy: Policy, own: bool) -> dict[str, float]:
    """Steps and computed tokens of regenerating every response with its group as history."""
    steps = computed = tokens = longest = longest_steps = 0
    rng = random.Random(0)
    for group in groups:
        group_steps = 0
        for sample, response in enumerate(group):
            index = _C.SuffixIndex(MAX_MATCH)
            history = [other for i, other in enumerate(group) if i != sample]
            if own:
                history.append(perturbed(response, rng))
            for other in history:
                index.extend(index.add_row(len(other)), other)
            row = index.add_row(len(response))
            position = row_steps = 0
            while position < len(response):
                proposal, _ = index.propose(
                    row, policy.max_tokens, policy.min_match, policy.tokens_per_match
                )
                count = 0
                for token, truth in zip(proposal, response[position:], strict=False):
                    if token != truth:
                        break
                    count += 1
                count = min(count + 1, len(response) - position)
                index.extend(row, response[position : position + count])
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


def speed(groups: list[list[list[int]]], results: Results) -> None:
    """Time of append and lookup as a generating row does them, and memory, over whole groups."""
    num_tokens = sum(len(response) for group in groups for response in group)
    num_bytes = 0

    def append_and_look_up() -> None:
        nonlocal num_bytes
        num_bytes = 0
        for group in groups:
            index = _C.SuffixIndex(MAX_MATCH)
            for response in group:
                row = index.add_row(len(response))
                for token in response:
                    index.extend(row, (token,))
                    index.propose(row, 8, 1, 8.0)
            num_bytes += index.num_bytes

    def append() -> None:
        for group in groups:
            index = _C.SuffixIndex(MAX_MATCH)
            for response in group:
                index.extend(index.add_row(len(response)), response)

    start = time.perf_counter()
    append_and_look_up()
    repeats = 3 if time.perf_counter() - start > 1 else 9
    for name, function in (("append + propose", append_and_look_up), ("append", append)):
        timing = measure(function, repeats=repeats, warmup=1)
        results.add(
            f"suffix_index {name}",
            timing=timing,
            shape={"tokens": num_tokens, "groups": len(groups)},
            nanoseconds_per_token=round(timing.p50 / num_tokens * 1e9, 1),
            bytes_per_token=round(num_bytes / num_tokens, 2),
        )


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
    speed(groups, results)
    lengths = (8,) if args.quick else (4, 8, 16, 32)
    for own in (False, True):
        for min_match in (1, 2, 3, 4):
            for max_tokens in lengths:
                for per_match in (float(max_tokens), 2.0):
                    policy = Policy(min_match, max_tokens, per_match)
                    start = time.perf_counter()
                    outcome = replay(groups, policy, own)
                    seconds = time.perf_counter() - start
                    results.rows.append(
                        {
                            "op": "history drafting",
                            "history": "siblings and own perturbed" if own else "siblings",
                            "min_match": min_match,
                            "max_tokens": max_tokens,
                            "adaptive": policy.adaptive,
                            "replay_seconds": round(seconds, 3),
                            **outcome,
                        }
                    )
                    print(results.rows[-1], flush=True)
    results.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
