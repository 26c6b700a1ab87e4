"""What is proposed on Model Runner V2, and what passes: the kernels against plain Python."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from laws import assert_law, p_value

from spec_rollout.acceptance import Coupled, Lenient, NoReuse, OneHot
from spec_rollout.engines.vllm import ReuseRequest
from spec_rollout.engines.vllm.worker.v2.plan import Plan
from spec_rollout.engines.vllm.worker.v2.rules import Rows, decide
from spec_rollout.engines.vllm.worker.v2.table import DraftTable, Field

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
SLOTS, WIDTH, VOCAB = 12, 6, 40


def make_table(first_chunk: int = 2) -> DraftTable:
    return DraftTable(
        SLOTS, 64, first_chunk=first_chunk, max_chunk=WIDTH - 1, device=torch.device("cpu")
    )


def add(table: DraftTable, slot: int, draft: list[int], rule: Any = None, **kw: Any) -> None:
    rule = Coupled() if rule is None else rule
    logprobs = kw.pop("logprobs", np.full(len(draft), -1.0, np.float32))
    request = ReuseRequest(
        kw.pop("key", slot), rule, np.array(draft, np.int32), logprobs, **kw.pop("request", {})
    )
    table.add(
        slot,
        kw.pop("request_id", f"r{slot}"),
        request,
        max_response_len=kw.pop("room", 40),
        stop_token_ids=frozenset(),
    )


class Step:
    """A step of random requests, each somewhere in its draft, with scheduled tokens of all kinds."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.table = make_table()
        self.prompt_lens = rng.integers(1, 9, SLOTS).astype(np.int32)
        self.slots = rng.permutation(SLOTS)[:7].astype(np.int32)
        self.drafts = [rng.integers(3, VOCAB, rng.integers(0, 14)).tolist() for _ in range(SLOTS)]
        self.done = np.array([rng.integers(0, len(d) + 3) for d in self.drafts])
        self.prefill_lens = self.prompt_lens.copy()
        late = self.slots[0]  # still in its prefill: what is drawn is nobody's
        self.done[late], self.prefill_lens[late] = 0, self.prompt_lens[late] + 5
        for slot, draft in enumerate(self.drafts):
            add(self.table, slot, draft, room=40 if slot % 2 else max(1, len(draft)))
        self.table.apply()
        self.follows = rng.random(SLOTS) < 0.7
        accepted = np.where(self.follows, self.done, np.maximum(self.done - 1, 0))
        self.follows |= accepted >= self.done
        self.table.numbers[:, Field.ACCEPTED] = torch.from_numpy(accepted)
        scheduled, drawn, positions, lens = [], [], [], []
        for slot in self.slots:
            draft, at = self.drafts[slot], int(self.done[slot])
            count = int(rng.integers(0, WIDTH))
            rest = (draft[at:] + [1] * WIDTH)[:count]  # vLLM fills up with something
            following = [int(t) if rng.random() < 0.9 else -1 for t in rest]
            scheduled += [9, *following]
            likely = (draft[at:] + [5] * WIDTH)[: count + 1]
            drawn += [token if rng.random() < 0.8 else 2 for token in likely]
            first = int(self.prompt_lens[slot]) + at - 1
            positions += range(first, first + count + 1)
            lens.append(count + 1)
        self.scheduled, self.drawn = np.array(scheduled), np.array(drawn)
        self.positions, self.cu = np.array(positions), np.cumsum([0, *lens])
        self.decisions = rng.choice(3, len(drawn), p=[0.4, 0.4, 0.2]).astype(np.int32)

    def expected(self, has_decisions: bool) -> tuple[list[list[int]], np.ndarray]:
        """Tokens given to each request, and the table's numbers afterwards."""
        numbers = self.table.numbers.numpy().copy()
        given = []
        for r, slot in enumerate(self.slots):
            rows = range(self.cu[r], self.cu[r + 1])
            row, at = numbers[slot], int(self.done[slot])
            is_new = self.positions[rows[0]] + 1 >= self.prefill_lens[slot]
            draft = self.drafts[slot] if self.follows[slot] and is_new else []
            tokens: list[int] = []
            kept, is_kept, rejected = 0, True, False
            for i, k in enumerate(rows):
                tokens.append(int(self.drawn[k]))
                here = draft[at + i] if at + i < len(draft) else None
                is_out = has_decisions and here is not None and self.decisions[k] == 2
                agrees = here is not None and here == self.drawn[k] and not is_out
                if is_kept and here is not None and not agrees:
                    rejected = True
                is_kept = is_kept and agrees
                kept += is_kept
                last = i + 1 == len(rows)
                if last or is_out or self.scheduled[k + 1] != self.drawn[k]:
                    break
            given.append(tokens)
            if at >= len(draft):
                continue
            proposals = sum(
                at + i < len(draft) and self.scheduled[k + 1] == draft[at + i]
                for i, k in enumerate(rows[:-1])
            )
            last_kept = kept == len(tokens)
            row[Field.ACCEPTED] = at + kept
            row[Field.TESTED] += kept + rejected
            row[Field.VERIFIED] += proposals + (
                last_kept and at + len(tokens) - 1 < row[Field.LIMIT]
            )
            row[Field.WASTED] += proposals - min(proposals, len(tokens) - 1)
            if last_kept and len(tokens) == len(rows) and len(tokens) - 1 >= row[Field.CHUNK]:
                row[Field.CHUNK] = min(2 * row[Field.CHUNK], WIDTH - 1)
        return given, numbers


@needs_triton
@pytest.mark.parametrize("has_decisions", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_outcome(seed: int, has_decisions: bool) -> None:
    from spec_rollout.engines.vllm.worker.v2 import kernels

    step = Step(seed)
    given, numbers = step.expected(has_decisions)
    sampled, num_sampled = kernels.outcome(
        step.table,
        torch.from_numpy(step.slots),
        drawn=torch.from_numpy(step.drawn),
        scheduled=torch.from_numpy(step.scheduled.astype(np.int32)),
        decisions=torch.from_numpy(step.decisions) if has_decisions else None,
        cu_rows=torch.from_numpy(step.cu.astype(np.int32)),
        positions=torch.from_numpy(step.positions),
        prompt_lens=torch.from_numpy(step.prompt_lens),
        prefill_lens=torch.from_numpy(step.prefill_lens),
        width=WIDTH,
    )
    found = [row[:n] for row, n in zip(sampled.tolist(), num_sampled.tolist(), strict=True)]
    assert found == given
    np.testing.assert_array_equal(step.table.numbers.numpy(), numbers)


@needs_triton
def test_propose() -> None:
    from spec_rollout.engines.vllm.worker.v2 import kernels

    table = make_table(first_chunk=3)
    add(table, 0, [11, 12, 13, 14, 15])
    add(table, 1, [11, 12, 13, 14, 15], room=5)  # its last token ends the response
    add(table, 2, [11, 12, 13])
    add(table, 3, [11, 12, 13])
    table.add(4, "plain", None)
    table.apply()
    done = np.array([0, 3, 1, 1, 2])
    table.numbers[:5, Field.ACCEPTED] = torch.tensor([0, 4, 1, 0, 0])
    proposed = kernels.propose(
        table,
        torch.tensor([4, 3, 2, 1, 0], dtype=torch.int32),
        num_sampled=torch.tensor([1, 1, 1, 1, 1], dtype=torch.int32),
        total_lens=torch.from_numpy((done + 2).astype(np.int32)),
        prompt_lens=torch.full((5,), 2, dtype=torch.int32),
        last_sampled=torch.tensor([90, 91, 92, 93, 94]),
    )
    assert table.counts[:5].tolist() == [3, 1, 2, 0, 0]
    assert proposed.tolist() == [
        [94] * 5,  # no draft
        [93] * 5,  # a token of it was rejected
        [12, 13, 92, 92, 92],
        [14, 91, 91, 91, 91],
        [11, 12, 13, 90, 90],
    ]
    kernels.propose(
        table,
        torch.tensor([0], dtype=torch.int32),
        num_sampled=torch.tensor([0], dtype=torch.int32),  # a piece of a prompt was computed
        total_lens=torch.tensor([2], dtype=torch.int32),
        prompt_lens=torch.tensor([2], dtype=torch.int32),
        last_sampled=torch.tensor([90]),
    )
    assert table.counts[0] == 0


def test_decisions_are_those_of_the_rules(generator: torch.Generator) -> None:
    from spec_rollout import ops

    table = make_table()
    drafts = torch.randint(3, VOCAB, (3, 8), generator=generator).tolist()
    logprobs = torch.randn(3, 8, generator=generator).numpy() - 2.0
    rules = [Lenient(0.2), Coupled(50.0), Coupled()]
    for slot, rule in enumerate(rules):
        request = {"first_position": 3 * slot}
        add(table, slot, drafts[slot], rule, logprobs=logprobs[slot], request=request)
    table.apply()
    table.numbers[:, Field.ACCEPTED] = 2
    # Each has two tokens of its response, and three scheduled: rows for tokens 2, 3, 4 and 5.
    slots = torch.arange(3).repeat_interleave(4)
    offsets = torch.arange(4).repeat(3)
    logits = torch.randn(12, VOCAB, generator=generator)
    drawn = torch.full((12,), 1)
    seen = []

    def draw(from_logits: torch.Tensor) -> torch.Tensor:
        seen.append(from_logits)
        return drawn

    lens = torch.full((SLOTS,), 5)
    found = table.rules(np.arange(3))
    assert list(found) == rules[:2]
    args = (table, found, Rows(slots, 6 + offsets, offsets), logits, draw)
    given, decisions = decide(*args, prompt_lens=lens, prefill_lens=lens)
    target = ops.token_logprobs(logits[:4], torch.tensor(drafts[0][2:6]))
    passed = [
        ops.accept_prefix(
            torch.from_numpy(logprobs[0, i : i + 1]),
            target[i - 2 : i - 1],
            rule=rules[0],
            keys=torch.tensor([0]),
            cu_draft_lens=torch.tensor([0, 1]),
            positions=torch.tensor([i]),
        ).item()
        for i in range(2, 6)
    ]
    assert decisions.tolist() == [1 if p else 2 for p in passed] + [0] * 8
    assert (
        given.tolist()
        == [d if p else 1 for d, p in zip(drafts[0][2:6], passed, strict=True)] + [1] * 8
    )
    bonus = seen[0] - logits
    assert bonus[:4].abs().max() == 0
    assert bonus[4:8].argmax(1).tolist() == drafts[1][2:6]
    assert bonus[8:].abs().max() == 0
    # In the middle of its prefill, or no longer followed: nothing is decided.
    table.numbers[:, Field.ACCEPTED] = 1
    assert decide(*args, prompt_lens=lens, prefill_lens=lens)[1].sum() == 0
    table.numbers[:, Field.ACCEPTED] = 2
    assert decide(*args, prompt_lens=lens, prefill_lens=lens + 9)[1].sum() == 0


def test_a_preempted_request_goes_on_where_it_was() -> None:
    table = make_table()
    table.begin(1, None, [], True)
    draft = [11, 12, 13, 14]
    add(table, 3, draft, request={"collect_id": 0}, request_id="preempted")
    table.apply()
    table.numbers[3, Field.ACCEPTED], table.numbers[3, Field.TESTED] = 2, 2
    table.leave(3)
    table.over(["somebody else's"])
    add(table, 3, [21, 22])  # its slot is taken by another
    add(table, 5, draft, request={"collect_id": 0}, request_id="preempted")
    table.apply()
    assert table.numbers[5, : Field.TESTED + 1].tolist() == [4, 4, 2, 2, 2]
    table.leave(5)
    table.over(["preempted"])
    *_, ids, accepted = table.take()
    assert (np.frombuffer(ids, "<i4").tolist(), np.frombuffer(accepted, "<i4").tolist()) == (
        [0],
        [2],
    )
    metrics = table.take_metrics(True)
    assert (metrics.num_drafts, metrics.num_accepted_tokens) == (2, 2)
    assert table.take_metrics(False).num_drafts == 0


def test_drafts_that_are_not_followed() -> None:
    table = make_table()
    add(table, 0, [5, 6], NoReuse())
    add(table, 1, [], Coupled())
    add(table, 2, [5, 6, 7], OneHot(), room=2)
    table.apply()
    assert table.numbers[:3, [Field.LEN, Field.LIMIT]].tolist() == [[0, 0], [0, 0], [2, 1]]
    assert not table.any_draft(np.array([0, 1]))
    assert table.any_draft(np.array([0, 2]))
    assert table.rules(np.array([0, 1, 2])) == {}


def test_plans_of_an_asynchronous_scheduler() -> None:
    draft = np.arange(10, 30, dtype=np.int32)

    def plan(**kw: Any) -> Plan:
        args = {"max_response_len": 50, "stop_token_ids": frozenset(), "first_chunk": 2, **kw}
        return Plan(draft, **args)

    p = plan()
    known = draft.tolist()
    assert p.next([], 1, 8) == 2  # the prompt's last step is under way
    assert p.next(known[:1], 3, 8) == 4
    assert p.next(known[:4], 5, 8) == 8
    assert p.next(known[:9], 9, 8) == 2
    assert p.next(known[:18], 3, 8) == 0
    p = plan(max_response_len=4)  # its last token ends the response
    assert [p.next([], 1, 8), p.next([], 3, 8)] == [2, 0]
    p = plan()
    assert p.next([10, 99], 1, 8) == 0
    assert p.next(known[:3], 1, 8) == 0


@pytest.mark.parametrize("rule", [Lenient(0.0), Lenient(0.4, scale=0.7), Coupled(0.6)])
def test_the_law_of_a_rule(rule: Any, generator: torch.Generator) -> None:
    """Drafts of one token each, of another policy; draws by noise that is not the test's."""
    count, vocab = 20_000, 8
    p = torch.randn(vocab, generator=generator).mul(1.5).softmax(0)
    q = torch.randn(vocab, generator=generator).mul(1.5).softmax(0)
    tokens = torch.multinomial(q, count, replacement=True, generator=generator)
    table = DraftTable(count, 2, first_chunk=1, max_chunk=1, device=torch.device("cpu"))
    table.tokens[:, 0] = tokens.int()
    table.logprobs = q.log()[tokens][:, None].expand(count, 2).contiguous()
    table.numbers[:, Field.LEN] = 1
    table.numbers[:, Field.KEY] = torch.arange(count)
    table.numbers[:, Field.RULE] = 1
    gumbel = -torch.log(-torch.log(torch.rand(count, vocab, generator=generator)))
    every = torch.arange(count)
    given, _ = decide(
        table,
        {rule: 1},
        Rows(every, torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)),
        p.log().repeat(count, 1),
        lambda logits: (logits + gumbel).argmax(1),
        prompt_lens=torch.ones(count, dtype=torch.int32),
        prefill_lens=torch.ones(count, dtype=torch.int32),
    )
    if isinstance(rule, Lenient):
        kept = q * (rule.scale * (rule.log_lenience + p.log() - q.log())).exp().clamp(max=1.0)
        law = kept + (1 - kept.sum()) * p
    else:
        boosted = (p.log() + torch.eye(vocab) * rule.log_lenience).softmax(1)
        law = q @ boosted
    assert_law(given.bincount(minlength=vocab), law.double() / law.double().sum())
    assert p_value(given.bincount(minlength=vocab), p.double() / p.double().sum()) < 1e-6


def test_rules_of_a_schedule_are_forgotten_with_their_calls() -> None:
    table = make_table()
    add(table, 7, [5, 6], Lenient(9.0))  # of a request that goes on
    for call in range(50):
        table.begin(1, None, [], True)
        add(table, 3, [5, 6], Lenient(call / 100))
        rules = table.rules(np.array([3, 7]))
        assert set(rules) == {Lenient(9.0), Lenient(call / 100)}
        assert len(set(rules.values())) == 2
        table.leave(3)
        table.over(["r3"])
        table.end()
        assert list(table._rules) == [Lenient(9.0)]


# Signatures as calls have them: [requests, K] of vLLM, where the smallest K is 1 and a step may have
# one token more than that.
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spec_rollout.engines.vllm.worker.v2 import kernels

WIDE = {"proposed", "last_sampled", "numbers", "sampled", "drawn", "scheduled", "positions"}
SCALARS = {"numbers_stride", "drafts_stride", "max_chunk"}

def build(kernel, arch, **constants):
    signature, constexprs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
        else:
            signature[name] = "i32" if name in SCALARS else "*i64" if name in WIDE else "*i32"
    made = triton.compile(
        ASTSource(kernel, signature, constexprs, {}), target=GPUTarget("cuda", arch, 32)
    )
    print(kernel.__name__, arch, len(made.asm["cubin"]))

for arch in (80, 90, 100):
    for width in (2, 32):
        block = triton.next_power_of_2(width)
        build(kernels._propose_kernel, arch, K=width - 1, BLOCK=triton.next_power_of_2(width - 1))
        for decided in (False, True):
            build(kernels._outcome_kernel, arch, HAS_DECISIONS=decided, WIDTH=width, BLOCK=block)
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path) -> None:
    """The interpreter takes what the compiler would refuse. Triton brings its own assembler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # or an older build would do
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 18
