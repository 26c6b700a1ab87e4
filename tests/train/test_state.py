"""state.json is believed only as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spec_rollout.rounding import Rounding
from spec_rollout.train.state import CheckpointError, TrainState, load_state

STATE = TrainState(
    4, "ab12", None, "cd34", "ef56", {"train.seed": 7, "data.shuffle": True, "train.epochs": 3}
)
ROUNDING = Rounding(100, 0.01, 0.3, ((0.5, 0.004), (0.99, 0.1)))
PENDING = {"step": 4, "epoch": 1, "reward": 0.5, "reward_text": None}


def write(folder: Path, state: TrainState, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = json.loads(state.to_json())
    for key, value in changes.items():
        if value is ...:
            del content[key]
        else:
            content[key] = value
    (folder / "state.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "state",
    [
        STATE,
        TrainState(0, ""),
        TrainState(4, "ab12", PENDING),
        TrainState(4, "ab12", lenience={"log_lenience": 0.5}),
        TrainState(4, "ab12", lenience={"log_lenience": -0.25, "estimate": 0.003}),
        TrainState(4, "ab12", rounding={"vllm, bfloat16, cuda": ROUNDING.state()}),
        TrainState(4, "ab12", base_fingerprint="cd34"),
        TrainState(4, "ab12", noise_offset=2**62 - 1),
        TrainState(4, "ab12", reference_fingerprint="cd34"),
        TrainState(0, "", {"step": 0, "epoch": 0}),
        TrainState(123_456_789, "x"),
        TrainState(1_000_000_000, "x"),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, state: TrainState) -> None:
    assert load_state(write(tmp_path / state.folder_name, state)) == state


@pytest.mark.parametrize(
    ("version", "absent"),
    [
        (3, ("lenience", "rounding", "base_fingerprint", "noise_offset", "reference_fingerprint")),
        (4, ("rounding", "base_fingerprint", "noise_offset", "reference_fingerprint")),
        (5, ("base_fingerprint", "noise_offset", "reference_fingerprint")),
        (6, ("noise_offset", "reference_fingerprint")),
        (7, ("reference_fingerprint",)),
    ],
)
def test_a_state_of_an_earlier_format_is_read(
    tmp_path: Path, version: int, absent: tuple[str, ...]
) -> None:
    changes = {"format_version": version, **dict.fromkeys(absent, ...)}
    folder = write(tmp_path / STATE.folder_name, STATE, **changes)
    assert load_state(folder) == STATE


def test_rounding_is_that_of_the_engine_it_was_measured_on() -> None:
    state = TrainState(4, "ab12", rounding={"vllm, bfloat16, cuda": ROUNDING.state()})
    assert state.rounding_of("vllm, bfloat16, cuda") == ROUNDING
    assert state.rounding_of("vllm, float32, cuda") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -3}, r"expected step: an integer from 0 to 1000000000, got -3"),
        ({"step": 10**9 + 1}, r"expected step: an integer .*, got 1000000001"),
        ({"step": 10**400}, r"expected step: an integer .*, got 10000"),
        ({"step": 4.0}, r"expected step: an integer .*, got 4\.0"),
        ({"step": True}, r"expected step: an integer .*, got True"),
        ({"step": "4"}, r"expected step: an integer .*, got '4'"),
        ({"step": None}, r"expected step: an integer .*, got None"),
        ({"step": 9}, r"expected the state of step-00000004, got that of step-00000009"),
        ({"step": ...}, r"expected the keys step, data_fingerprint"),
        ({"extra": 1}, r"expected the keys step, data_fingerprint"),
        ({"format_version": 2}, r"expected format_version 3 or 4 or 5 or 6 or 7 or 8, got 2"),
        ({"format_version": 4.0}, r"expected format_version 3 or 4 or 5 or 6 or 7 or 8, got 4\.0"),
        ({"format_version": ...}, r"expected format_version 3 or 4 or 5 or 6 or 7 or 8, got None"),
        ({"lenience": []}, r"expected lenience: log_lenience and estimate"),
        ({"lenience": {"estimate": 1.0}}, r"expected lenience: .*, got \{'estimate': 1\.0\}"),
        ({"lenience": {"log_lenience": "0.5"}}, r"expected lenience: "),
        ({"rounding": []}, r"expected rounding: an object, got \[\]"),
        ({"rounding": {"vllm": 3}}, r"rounding: expected num_tokens, mean, .*, got 3"),
        ({"rounding": {"vllm": {**ROUNDING.state(), "mean": -1.0}}}, r"rounding: expected num_"),
        ({"rounding": {"vllm": {**ROUNDING.state(), "quantiles": [[0.5, 0.1]]}}}, r"rounding: exp"),
        ({"data_fingerprint": None}, r"expected data_fingerprint: a string, got None"),
        ({"base_fingerprint": None}, r"expected base_fingerprint: a string, got None"),
        ({"reference_fingerprint": 1}, r"expected reference_fingerprint: a string, got 1"),
        ({"heldout_fingerprint": 3}, r"expected heldout_fingerprint: a string, got 3"),
        ({"noise_offset": -1}, r"expected noise_offset: an integer from 0 to \d+, got -1"),
        ({"noise_offset": 2**62}, r"expected noise_offset: an integer from 0 to \d+, got 4611"),
        ({"noise_offset": "3"}, r"expected noise_offset: an integer from 0 to \d+, got '3'"),
        ({"order": []}, r"expected order: integers and truth values by key, got \[\]"),
        ({"order": {"train.seed": "7"}}, r"expected order: integers and truth"),
        ({"pending_row": 4}, r"expected pending_row: an object or null, got 4"),
        ({"pending_row": {"step": 3, "epoch": 0}}, r"expected pending_row: of step 4, got 3"),
        ({"pending_row": {"step": 4, "epoch": -1}}, r"expected pending_row: an epoch from 0"),
        ({"pending_row": {"step": 4}}, r"expected pending_row: an epoch from 0 on, got None"),
        # A row that is pending makes it the checkpoint before the evaluation.
        ({"pending_row": PENDING}, r"expected .*, got that of step-00000004-unevaluated"),
    ],
)
def test_what_does_not_hold_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"state\.json: ({message})"):
        load_state(write(tmp_path / STATE.folder_name, STATE, **changes))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "4", "{", "[" * 100_000, "\x00", '{"step": ', '{"step": 1' + "0" * 5000 + "}"],
)
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / STATE.folder_name, STATE)
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json: expected "):
        load_state(folder)
