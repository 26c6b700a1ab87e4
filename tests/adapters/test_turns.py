"""What requests of an agent loop say, with drafts in shards that are called without Ray."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient
from spec_rollout.adapters.draft_pool import (
    Begun,
    DraftShard,
    Ended,
    common_prefix,
    save_shards,
    start_shards,
)
from spec_rollout.adapters.settings import ReuseSettings
from spec_rollout.adapters.turns import (
    COUNT_NAMES,
    KeyedTurn,
    NamedTurn,
    RepeatableNoise,
    Reuse,
    RolloutName,
    fresh_turn,
    verify_steps,
)
from spec_rollout.engines.vllm.wire import ReuseRequest, SampleName, parse

PARAMS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
PROMPT = [5, 6, 7]
NAME = RolloutName("train/3", sample=2, step=1, is_validation=False)


@dataclass
class Output:
    """As verl's TokenOutput, which is not installed here."""

    token_ids: list[int]
    log_probs: list[float] | None
    extra_fields: dict[str, Any] = field(default_factory=dict)

    def model_copy(self, update: dict[str, Any]) -> Output:
        return replace(self, **update)


class Shards:
    """`DraftPool` over a shard in this process; fails when told to."""

    def __init__(self) -> None:
        self.shard = DraftShard()
        self.error: Exception | None = None
        self.num_calls = 0

    async def begin(self, *args: Any) -> Begun:
        self._count()
        return self.shard.begin(*args)

    async def end(self, *args: Any) -> Ended:
        self._count()
        return self.shard.end(*args)

    def _count(self) -> None:
        self.num_calls += 1
        if self.error is not None:
            raise self.error


def make_reuse(**settings: Any) -> tuple[Reuse, Shards]:
    reuse, shards = Reuse(ReuseSettings(**settings), max_chunk=31), Shards()
    reuse._pool = shards  # type: ignore[assignment]
    return reuse, shards


def begin(reuse: Reuse, name: RolloutName | None = NAME, **params: Any) -> Any:
    has_media = params.pop("has_media", False)
    return asyncio.run(reuse.begin(name, PROMPT, {**PARAMS, **params}, has_media))


def end(reuse: Reuse, turn: Any, output: Output, name: RolloutName | None = NAME) -> Output:
    return asyncio.run(reuse.end(name, turn, output))


def said(turn: Any, prompt_ids: list[int] = PROMPT) -> Any:
    """What the engine reads in a request."""
    return parse(turn.extra_args(prompt_ids)["spec_rollout"])


def roll(reuse: Reuse, ids: list[int], name: RolloutName = NAME, logprob: float = -1.0) -> Output:
    """A whole rollout that gives `ids`."""
    turn = begin(reuse, name)
    return end(reuse, turn, Output(ids, [logprob] * len(ids)), name)


def test_an_engine_with_drafts_is_told_the_sample() -> None:
    reuse, shards = make_reuse(refresh_steps=10)
    turn = begin(reuse, replace(NAME, step=25))
    assert isinstance(turn, NamedTurn)
    assert said(turn) == SampleName(2, epoch=2, prompt_id="train/3")
    # With what an aborted request gave behind the prompt, it says the same.
    assert said(turn, [*PROMPT, 9]) == said(turn)
    output = end(reuse, turn, Output([1], [-1.0]))
    assert output.extra_fields == {}
    assert shards.num_calls == 0


@pytest.mark.parametrize("drafts", ["engine", "actors"])
def test_validation_touches_no_drafts(drafts: str) -> None:
    reuse, shards = make_reuse(drafts=drafts)
    name = replace(NAME, is_validation=True)
    first, second = begin(reuse, name, temperature=0.0), begin(reuse, name)
    for turn in (first, second):
        request = said(turn)
        assert isinstance(request, ReuseRequest)
        assert request.rule == Coupled()
        assert request.draft_ids.size == 0
    assert said(first).key != said(second).key
    assert end(reuse, second, Output([1], [-1.0]), name).extra_fields == {}
    assert shards.num_calls == 0


@pytest.mark.parametrize("drafts", ["engine", "actors"])
def test_requests_that_are_left_to_vllm_say_nothing(drafts: str) -> None:
    reuse, shards = make_reuse(drafts=drafts)
    assert begin(reuse, repetition_penalty=1.1) is None
    assert begin(reuse, temperature=0) is None
    assert begin(reuse, None) is None
    assert begin(reuse, replace(NAME, is_validation=True), presence_penalty=0.5) is None
    assert shards.num_calls == 0
    assert reuse.counters["failures"] == 0


def test_the_next_epoch_follows_the_last_rollout() -> None:
    reuse, _ = make_reuse(drafts="actors", mode="lenient", log_lenience=0.5)
    roll(reuse, [1, 2, 3, 4])
    other = replace(NAME, sample=0, step=9)
    assert said(begin(reuse, other)).draft_ids.size == 0
    turn = begin(reuse, replace(NAME, step=9))
    request = said(turn)
    assert request.draft_ids.tolist() == [1, 2, 3, 4]
    assert request.draft_logprobs.tolist() == [-1.0] * 4
    assert request.rule == Lenient(0.5)
    assert (request.first_position, request.collect_id) == (0, -1)
    output = end(reuse, turn, Output([1, 2, 8], [-0.5] * 3), replace(NAME, step=9))
    assert [output.extra_fields[name] for name in COUNT_NAMES] == [4, 2, 1]
    assert output.log_probs == [-0.5] * 3
    assert reuse.counters == {
        "rollouts": 3, "with_draft": 1, "draft_tokens": 4, "reused_tokens": 2, "tokens": 7,
        "failures": 0,
    }  # fmt: skip
    assert said(begin(reuse, replace(NAME, step=17))).draft_ids.tolist() == [1, 2, 8]


def test_prompts_of_other_rows_and_other_prompts_are_apart() -> None:
    reuse, _ = make_reuse(drafts="actors")
    roll(reuse, [1, 2, 3])
    later = replace(NAME, step=2)
    assert said(begin(reuse, replace(later, user_key="train/4"))).draft_ids.size == 0
    turn = asyncio.run(reuse.begin(replace(later, step=3), [5, 6, 8], PARAMS, False))
    assert said(turn).draft_ids.size == 0
    assert said(begin(reuse, later)).draft_ids.tolist() == [1, 2, 3]


def test_noise_is_kept_by_coupled_and_fresh_by_lenient() -> None:
    for mode, kept in (("coupled", True), ("lenient", False)):
        reuse, _ = make_reuse(drafts="actors", mode=mode)
        keys = [said(begin(reuse, replace(NAME, step=step))).key for step in (1, 2)]
        assert (keys[0] == keys[1]) == kept
    reuse, _ = make_reuse(drafts="actors", refresh_steps=2)
    keys = [said(begin(reuse, replace(NAME, step=step))).key for step in (2, 3, 4)]
    assert keys[0] == keys[1] != keys[2]


def test_a_run_that_begins_with_drafts_of_another_draws_other_noise(tmp_path: Path) -> None:
    """It has the same seed, and its steps the same numbers."""
    for mode in ("coupled", "lenient"):
        path, keys = str(tmp_path / mode), []
        for _ in range(3):
            reuse, shards = make_reuse(drafts="actors", mode=mode)
            shards.shard = DraftShard(path=path)
            roll(reuse, [1, 2, 3], replace(NAME, step=1), logprob=-1.0 - len(keys))
            keys.append(said(begin(reuse, replace(NAME, step=2))).key)
            shards.shard.save()
        assert len(set(keys)) == (1 if mode == "coupled" else 3)


def test_a_sample_asked_for_twice_in_a_step_draws_other_noise() -> None:
    reuse, _ = make_reuse(drafts="actors")
    roll(reuse, [1, 2, 3])
    later = replace(NAME, step=2)
    first, second = begin(reuse, later), begin(reuse, later)
    assert said(first).draft_ids.tolist() == [1, 2, 3]
    assert said(second).draft_ids.size == 0
    assert said(first).key != said(second).key
    # Only the first is kept.
    end(reuse, first, Output([4], [-1.0]), later)
    output = end(reuse, second, Output([7, 7], [-1.0] * 2), later)
    assert [output.extra_fields[name] for name in COUNT_NAMES] == [0, 0, 0]
    assert said(begin(reuse, replace(NAME, step=3))).draft_ids.tolist() == [4]


def test_plain_samples_are_those_of_another_run_where_that_is_asked_for() -> None:
    validation = replace(NAME, is_validation=True)

    def keys(seed: int | None, worker: int = 0) -> list[int]:
        """Of validation (twice), of a sample that is asked for again, and of images."""
        reuse, shards = make_reuse(drafts="actors")
        if seed is not None:
            reuse.noise = RepeatableNoise(seed, worker)
        turns = [begin(reuse, name) for name in (validation, validation)]
        turns += [begin(reuse, replace(validation, **more)) for more in (
            {"sample": 1}, {"step": 2}, {"user_key": "train/4"}, {"step": 1},
        )]  # fmt: skip
        turns.append(begin(reuse))
        turns += [begin(reuse), begin(reuse), begin(reuse, has_media=True)]
        shards.error = OSError("gone")
        turns += [begin(reuse), begin(reuse)]
        return [said(turn).key for turn in turns]

    first = keys(7)
    assert keys(7) == first
    assert len(set(first)) == len(first)
    for other in (keys(8), keys(7, worker=1), keys(None)):
        assert len(set(first) & set(other)) == 1  # the sample's own, by the settings' seed
    assert len(set(keys(None)) & set(keys(None))) == 1


def test_what_was_asked_for_is_forgotten_after_some_steps() -> None:
    noise = RepeatableNoise(0, 0)
    for step in range(100):
        noise.next_key(replace(NAME, step=step), PROMPT)
    assert len(noise._asked) < 10


def test_an_aborted_request_goes_on_at_its_place() -> None:
    turn = KeyedTurn(
        77, Lenient(0.0), 3, np.arange(10, 20, dtype=np.int32), np.zeros(10, np.float32)
    )
    again = said(turn, [*PROMPT, 10, 11, 12])
    assert (again.key, again.first_position) == (77, 3)
    assert again.draft_ids.tolist() == [13, 14, 15, 16, 17, 18, 19]
    assert again.draft_logprobs.size == 7
    # It left the draft: nothing of it is proposed any more.
    left = said(turn, [*PROMPT, 10, 99])
    assert (left.first_position, left.draft_ids.size) == (2, 0)
    # It has gone past the draft's end.
    past = said(turn, [*PROMPT, *range(10, 20), 3])
    assert (past.first_position, past.draft_ids.size) == (11, 0)
    # It gave nothing at all.
    assert said(turn).draft_ids.size == 10
    assert said(fresh_turn(PROMPT), [*PROMPT, 1]).first_position == 1


def test_failing_drafts_leave_plain_rollouts(caplog: pytest.LogCaptureFixture) -> None:
    reuse, shards = make_reuse(drafts="actors")
    roll(reuse, [1, 2, 3])
    shards.error = OSError("the actor is gone")
    num_calls = shards.num_calls
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            turn = begin(reuse, replace(NAME, step=2))
            assert said(turn).draft_ids.size == 0
            output = end(reuse, turn, Output([4], [-1.0]), replace(NAME, step=2))
            # Rows without counts beside rows with them fail verl's older trainer.
            assert [output.extra_fields[name] for name in COUNT_NAMES] == [0, 0, 0]
    assert shards.num_calls == num_calls + 1  # nobody waits again in that step
    assert reuse.counters["failures"] == 3
    assert [record.message.count("the actor is gone") for record in caplog.records] == [1]
    shards.error = None
    assert said(begin(reuse, replace(NAME, step=3))).draft_ids.tolist() == [1, 2, 3]


def test_a_response_that_cannot_be_kept_is_given_all_the_same() -> None:
    reuse, shards = make_reuse(drafts="actors")
    turn = begin(reuse)
    shards.error = TimeoutError()
    output = end(reuse, turn, Output([4, 5], [-1.0] * 2))
    assert output.token_ids == [4, 5]
    assert reuse.counters["failures"] == 1


def test_prompts_with_images_are_passed_by() -> None:
    reuse, shards = make_reuse(drafts="actors")
    assert said(begin(reuse, has_media=True)).draft_ids.size == 0
    assert shards.num_calls == 0


def test_behaviour_log_probs_go_back_for_reused_tokens() -> None:
    reuse, _ = make_reuse(
        drafts="actors", mode="lenient", log_lenience=9.0, behaviour_logprobs=True
    )
    roll(reuse, [1, 2, 3], replace(NAME, step=1), logprob=-1.0)
    second = roll(reuse, [1, 2, 9, 9], replace(NAME, step=2), logprob=-2.0)
    assert second.log_probs == [-1.0, -1.0, -2.0, -2.0]
    third = roll(reuse, [1, 2, 9, 4], replace(NAME, step=3), logprob=-3.0)
    assert third.log_probs == [-1.0, -1.0, -2.0, -3.0]
    # The test of the next draft reads those of the last policy all the same.
    turn = begin(reuse, replace(NAME, step=4))
    assert said(turn).draft_logprobs.tolist() == [-3.0] * 4


def test_what_is_rejected_and_drawn_again_is_not_reused() -> None:
    """Between -1 and -60 no uniform number passes: the tokens are the draft's by chance."""
    reuse, _ = make_reuse(drafts="actors", mode="lenient", behaviour_logprobs=True)
    roll(reuse, [1, 2, 3], replace(NAME, step=1), logprob=-1.0)
    turn = begin(reuse, replace(NAME, step=2))
    again = Output([1, 2, 3, 4], [-1.0, -60.0, -1.0, -2.0])
    output = end(reuse, turn, again, replace(NAME, step=2))
    assert output.log_probs == [-1.0, -60.0, -1.0, -2.0]
    assert [output.extra_fields[name] for name in COUNT_NAMES] == [3, 1, 1]
    assert reuse.counters["reused_tokens"] == 1
    # So it stays when the next one follows them.
    turn = begin(reuse, replace(NAME, step=3))
    output = end(reuse, turn, Output([1, 2, 3], [-0.5] * 3), replace(NAME, step=3))
    assert output.log_probs == [-1.0, -60.0, -1.0]


def test_what_is_kept_is_what_the_engine_keeps() -> None:
    """Of the same key, places and log-probs the engine's own op decides alike."""
    rng = np.random.default_rng(0)
    ids = np.arange(30, dtype=np.int32)
    kept_lens = set()
    for key in range(50):
        draft, now = np.minimum(rng.normal(-1.0, 0.3, (2, 30)), -0.01).astype(np.float32)
        turn = KeyedTurn(key, Lenient(0.1), 3, ids, draft)
        logits = torch.full((31, 40), -50.0)
        logits[torch.arange(30), torch.arange(30)] = torch.from_numpy(now)
        logits[:30, 39] = torch.log1p(-torch.exp(torch.from_numpy(now)))  # the rest of 1
        kept, _, _ = ops.verify_prefix(
            logits,
            torch.from_numpy(ids),
            torch.tensor([0, 30]),
            rule=turn.rule,
            keys=torch.tensor([key]),
            draft_logprobs=torch.from_numpy(draft),
        )
        target = ops.token_logprobs(logits[:30], torch.from_numpy(ids))
        assert turn.kept_len(ids, target.numpy()) == int(kept)
        kept_lens.add(int(kept))
    assert len(kept_lens) > 3


def test_a_shard_is_written_and_read(tmp_path: Path) -> None:
    path = str(tmp_path / "drafts" / "0.cache")
    shard = DraftShard(path=path)
    ids, logprobs = np.array([1, 2], np.int32), np.array([-1, -2], np.float32)
    shard.end(b"k" * 16, 0, ids, logprobs, 0, 1)
    shard.save()
    begun = DraftShard(path=path).begin(b"k" * 16, 0, 2, 100)
    assert begun.token_ids.tolist() == [1, 2]
    assert begun.logprobs.tolist() == [-1, -2]
    assert DraftShard(path=path).begin(b"k" * 16, 0, 2, 1).token_ids.tolist() == [1]
    assert DraftShard(max_bytes=10, path=path).begin(b"k" * 16, 0, 2, 9).token_ids.size == 0


def test_a_folder_of_another_number_of_actors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "drafts_1_of_4.cache"
    DraftShard(path=str(path)).save()
    DraftShard(path=str(tmp_path / "drafts_0_of_4.cache"))
    match = r"num_actors: expected 4, .*drafts_1_of_4\.cache, got 2: set num_actors=4 "
    with pytest.raises(ValueError, match=match):
        DraftShard(path=str(tmp_path / "drafts_0_of_2.cache"))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())  # before it is asked for anything
    with pytest.raises(ValueError, match=match):
        start_shards("name", 2, folder=str(tmp_path))


def test_all_shards_are_written_though_one_fails_and_one_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Shard:
        def __init__(self, name: str) -> None:
            self.name = name
            self.save = self

        def remote(self) -> str:
            events.append(f"asked {self.name}")
            return self.name

    def get(name: str) -> None:
        events.append(f"waited for {name}")
        if name == "a":
            raise OSError("disk full")

    def wait(names: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert (num_returns, timeout) == (3, 600)
        return names[:2], names[2:]  # c's disk hangs

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=get, wait=wait))
    errors = save_shards([Shard("a"), Shard("b"), Shard("c")])
    assert [str(error) for error in errors] == [
        "disk full",
        "1 of 3 actors have not answered in 600 seconds",
    ]
    assert events == ["asked a", "asked b", "asked c", "waited for a", "waited for b"]


@pytest.mark.parametrize(
    ("draft", "response", "expected"),
    [
        ([], [1], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 9], [1, 2], 1),
        ([3], [4], 0),
    ],
)
def test_common_prefix(draft: list[int], response: list[int], expected: int) -> None:
    assert common_prefix(np.array(draft, np.int32), np.array(response, np.int32)) == expected


@pytest.mark.parametrize(
    ("accepted", "length", "most", "expected"),
    [
        (0, 0, 31, 0),  # no draft
        (0, 5, 31, 1),
        (15, 40, 31, 1),  # rejected within the first chunk of 16
        (16, 40, 31, 2),  # at the first of the second
        (40, 40, 31, 2),  # 16 + 31
        (100, 100, 31, 4),  # 16 + 31 + 31 + 22
        (3, 8, 2, 2),  # chunks of 2
    ],
)
def test_verify_steps(accepted: int, length: int, most: int, expected: int) -> None:
    assert verify_steps(accepted, length, most) == expected


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"draft": "actors"}, "spec_rollout.draft: expected one of drafts, "),
        ({"drafts": "disk"}, "spec_rollout.drafts: expected engine or actors, got 'disk'"),
        ({"drafts": "actors", "mode": "drafting"}, "spec_rollout.mode: expected coupled or lenient"),
        ({"drafts": "actors", "num_actors": 0}, "spec_rollout.num_actors: expected at least 1"),
        ({"drafts": "actors", "num_actors": 1.5}, "spec_rollout.num_actors: expected int, got 1.5"),
        ({"drafts": "actors", "seed": True}, "spec_rollout.seed: expected int, got True"),
        ({"drafts": "actors", "timeout": -1}, "spec_rollout.timeout: expected at least 0"),
        (
            {"drafts": "actors", "folder": "drafts"},
            "spec_rollout.folder: expected the absolute path of a folder, got 'drafts'",
        ),
        *(
            ({name: value}, f"spec_rollout.{name}: expected it with spec_rollout.drafts=actors only")
            for name, value in (
                ("mode", "lenient"), ("num_actors", 2), ("max_bytes", 1 << 30), ("timeout", 5.0),
            )
        ),
        (
            {"drafts": "actors", "mode": "lenient", "log_lenience": float("nan")},
            "spec_rollout.log_lenience: expected",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ReuseSettings.from_mapping(values, source="spec_rollout")


def test_settings_by_name() -> None:
    values = {"drafts": "actors", "log_lenience": 1, "shards": ["a"]}
    settings = ReuseSettings.from_mapping(values, source="spec_rollout")
    assert settings.rule == Coupled(1.0)
    assert settings.shards == ("a",)
