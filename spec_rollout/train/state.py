"""What a checkpoint says about itself: its name and state.json, believed only as a whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spec_rollout.rounding import Rounding

FORMAT_VERSION = 8
# What the formats up to each of these do not know.
_ADDED: Mapping[int, dict[str, Any]] = {
    3: {"lenience": {}},
    4: {"rounding": {}},
    5: {"base_fingerprint": ""},
    6: {"noise_offset": 0},
    7: {"reference_fingerprint": ""},
}
_ABSENT_BEFORE: Mapping[int, dict[str, Any]] = {
    version: {k: v for last, new in _ADDED.items() if last >= version for k, v in new.items()}
    for version in (*_ADDED, FORMAT_VERSION)
}
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})(-unevaluated)?")
_LARGEST_STEP = 10**9
_END_OF_OFFSETS = 2**62


class CheckpointError(ValueError):
    """A checkpoint is not usable; the message names the file, and what was expected and found."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a checkpoint holds besides tensors.

    Attributes:
        step: Updates done. The next step's prompts follow from it.
        data_fingerprint: Of the training prompts.
        pending_row: Metrics of the last step while its evaluation was still to come, else None. At
            the beginning these are no more than step and epoch.
        data_rendering: Of the prompts' token ids.
        heldout_fingerprint: Of the held-out prompts; empty if there are none.
        order: Settings that say which rows a step sees, by key of the config.
        lenience: Of the controller that holds a budget (`lenience`); empty without one.
        rounding: Of the engine, by what the engine is (`rounding_of`); empty until it is measured.
        base_fingerprint: Of the weights beneath an adapter (`adapter.fingerprint`), which the
            checkpoint does not hold; empty without an adapter.
        reference_fingerprint: Of the weights that the KL is to, which the checkpoint does not hold;
            empty if there was no KL so far.
        noise_offset: Of the session: what the run's first rollouts were (`RolloutCache.
            fingerprint`), 0 if it began with none. A resumed run keeps it.
    """

    step: int
    data_fingerprint: str
    pending_row: dict[str, Any] | None = None
    data_rendering: str = ""
    heldout_fingerprint: str = ""
    order: Mapping[str, int | bool] = field(default_factory=dict)
    lenience: Mapping[str, float] = field(default_factory=dict)
    rounding: Mapping[str, Any] = field(default_factory=dict)
    base_fingerprint: str = ""
    noise_offset: int = 0
    reference_fingerprint: str = ""

    def rounding_of(self, engine: str) -> Rounding | None:
        """What was measured of that engine; None if it was another, or nothing was.

        Args:
            engine: Names all that its rounding depends on.
        """
        found = self.rounding.get(engine)
        return None if found is None else Rounding.of_state(found)

    @property
    def last_recorded(self) -> int:
        """The last step whose metrics row is complete; -1 at the beginning."""
        return self.step if self.pending_row is None else self.step - 1

    @property
    def folder_name(self) -> str:
        """Of the checkpoint."""
        return f"step-{self.step:08d}" + ("" if self.pending_row is None else "-unevaluated")

    def to_json(self) -> str:
        """Content of state.json."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"


def age_of(folder: Path) -> tuple[int, bool] | None:
    """What sorts checkpoints by age, from their folder's name; None if it is no checkpoint's.

    Of a step the one before its evaluation is older.
    """
    match = _NAME.fullmatch(folder.name)
    return None if match is None else (int(match[1]), match[2] is None)


def load_state(folder: Path) -> TrainState:
    """The state of a checkpoint.

    Raises:
        CheckpointError: if any of it is not as `TrainState` says, or it is that of another folder.
    """
    path = folder / STATE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected the state of a checkpoint, cannot read it: {error!r}"
        ) from None

    def require(ok: bool, expected: str, got: object) -> None:
        if not ok:
            raise CheckpointError(f"{path}: expected {expected}, got {got!r:.200}")

    require(isinstance(content, dict), "an object", content)
    version = content.pop("format_version", None)
    known = type(version) is int and version in _ABSENT_BEFORE
    require(known, f"format_version {' or '.join(map(str, _ABSENT_BEFORE))}", version)
    content.update(_ABSENT_BEFORE[version])
    names = [f.name for f in fields(TrainState)]
    require(sorted(content) == sorted(names), f"the keys {', '.join(names)}", sorted(content))
    step, row, order = content["step"], content["pending_row"], content["order"]
    in_range = type(step) is int and 0 <= step <= _LARGEST_STEP
    require(in_range, f"step: an integer from 0 to {_LARGEST_STEP}", step)
    for name in names:
        if name.endswith("_fingerprint") or name == "data_rendering":
            require(isinstance(content[name], str), f"{name}: a string", content[name])
    offset = content["noise_offset"]
    in_range = type(offset) is int and 0 <= offset < _END_OF_OFFSETS
    require(in_range, f"noise_offset: an integer from 0 to {_END_OF_OFFSETS - 1}", offset)
    require(
        isinstance(order, dict) and all(type(v) in (int, bool) for v in order.values()),
        "order: integers and truth values by key",
        order,
    )
    lenience = content["lenience"]
    require(
        isinstance(lenience, dict)
        and lenience.keys() in ({"log_lenience", "estimate"}, {"log_lenience"}, set())
        and all(type(v) in (int, float) and math.isfinite(v) for v in lenience.values()),
        "lenience: log_lenience and estimate, finite numbers, or nothing",
        lenience,
    )
    rounding = content["rounding"]
    require(isinstance(rounding, dict), "rounding: an object", rounding)
    for measured in rounding.values():
        try:
            Rounding.of_state(measured)
        except (AttributeError, ValueError) as error:
            raise CheckpointError(f"{path}: rounding: {error}") from None
    require(row is None or isinstance(row, dict), "pending_row: an object or null", row)
    if row is not None:
        require(row.get("step") == step, f"pending_row: of step {step}", row.get("step"))
        epoch = row.get("epoch")
        require(type(epoch) is int and epoch >= 0, "pending_row: an epoch from 0 on", epoch)
    state = TrainState(**content)
    if folder.name != state.folder_name:
        raise CheckpointError(
            f"{path}: expected the state of {folder.name}, got that of {state.folder_name}"
        )
    return state
