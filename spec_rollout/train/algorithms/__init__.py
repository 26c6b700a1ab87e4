"""Algorithms of reinforcement learning, by name.

`base` says what an algorithm is; a file per algorithm; `advantages`, `gae` and `losses` are the
pure functions they are made of. A new algorithm is a file here and a line in `_ALGORITHMS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.train.algorithms.base import (
    AdvantageInputs,
    Advantages,
    Algorithm,
    LossInputs,
    LossOutputs,
    Needs,
)
from spec_rollout.train.algorithms.dapo import DAPO
from spec_rollout.train.algorithms.grpo import GRPO
from spec_rollout.train.algorithms.ppo import PPO

__all__ = [
    "DAPO",
    "GRPO",
    "PPO",
    "AdvantageInputs",
    "Advantages",
    "Algorithm",
    "LossInputs",
    "LossOutputs",
    "Needs",
    "make",
    "names",
]

_ALGORITHMS: Mapping[str, Callable[[TrainConfig], Algorithm]] = {
    "grpo": GRPO,
    "ppo": PPO,
    "dapo": DAPO,
}


def names() -> tuple[str, ...]:
    """What `train.algorithm` may be."""
    return tuple(_ALGORITHMS)


def make(config: TrainConfig) -> Algorithm:
    """The algorithm that `config.algorithm` names, with the settings of `config`.

    Raises:
        ConfigError: if there is none of that name; the message lists those there are.
    """
    if config.algorithm not in _ALGORITHMS:
        near = difflib.get_close_matches(config.algorithm, _ALGORITHMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"train.algorithm: expected one of {', '.join(_ALGORITHMS)}, "
            f"got {config.algorithm!r}{hint}"
        )
    return _ALGORITHMS[config.algorithm](config)
