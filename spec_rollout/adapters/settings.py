"""How the rollouts of a trainer that owns its engine are to be reused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient

_CHOICES = {"drafts": ("engine", "actors"), "mode": ("coupled", "lenient")}
_LEAST = {"refresh_steps": 0, "num_actors": 1, "max_bytes": 0, "timeout": 0.0}
# What an engine that keeps the drafts is told by its own options.
_OF_ACTORS = (
    *("mode", "log_lenience", "seed", "folder", "behaviour_logprobs"),
    *("num_actors", "max_bytes", "timeout"),
)


@dataclass(frozen=True, slots=True)
class ReuseSettings:
    """A section of the trainer's configuration.

    Attributes:
        drafts: Who keeps them: `engine`, each replica what it generated itself, or `actors` of the
            job (`draft_pool`), where every replica finds everything.
        mode: With `actors`: `coupled` (lossless) or `lenient`.
        log_lenience: With `actors`: of the rule; 0 is the one without bias for `coupled`.
        seed: With `actors`: of the noise.
        refresh_steps: `coupled` draws new noise every so many training steps; 0 is never.
        num_actors: Number of `actors`; each has a part of the prompts.
        max_bytes: With `actors`: of all of them together; 0 is no bound.
        folder: With `actors`: where drafts are written for a resumed run, when the step after one
            of the trainer's checkpoints begins; an absolute path, as each process has a folder of
            its own to start from. "" keeps them in memory only.
        timeout: With `actors`: seconds to wait for one; then rollouts are plain ones.
        behaviour_logprobs: With `actors`: the log-probs that go back with reused tokens are those
            with which they were first drawn, for the trainer's own correction.
        shards: Names of the actors; not for users.
    """

    drafts: str = "engine"
    mode: str = "coupled"
    log_lenience: float = 0.0
    seed: int = 0
    refresh_steps: int = 0
    num_actors: int = 1
    max_bytes: int = 0
    folder: str = ""
    timeout: float = 30.0
    behaviour_logprobs: bool = False
    shards: tuple[str, ...] = ()

    @property
    def rule(self) -> AcceptanceRule:
        """Of drafts that come from actors."""
        make = Lenient if self.mode == "lenient" else Coupled
        return make(self.log_lenience)

    def noise_epoch(self, step: int) -> int:
        """Of samples whose noise is kept."""
        return step // self.refresh_steps if self.refresh_steps else 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str) -> ReuseSettings:
        """Settings by name.

        Args:
            values: Name -> value; what is missing keeps its default.
            source: Where they come from; named in errors.

        Raises:
            ValueError: naming source and key, what was expected and what came.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in defaults:
                raise ValueError(
                    f"{source}.{name}: expected one of {', '.join(defaults)}, got an unknown key"
                )
            if name != "shards" and not _is_like(value, defaults[name]):
                raise ValueError(
                    f"{source}.{name}: expected {type(defaults[name]).__name__}, got {value!r}"
                )
        settings = cls(**{**values, "shards": tuple(values.get("shards", ()))})
        for name, choices in _CHOICES.items():
            if (value := getattr(settings, name)) not in choices:
                raise ValueError(f"{source}.{name}: expected {' or '.join(choices)}, got {value!r}")
        for name, least in _LEAST.items():
            if (value := getattr(settings, name)) < least:
                raise ValueError(f"{source}.{name}: expected at least {least}, got {value}")
        if settings.folder and not os.path.isabs(settings.folder):
            raise ValueError(
                f"{source}.folder: expected the absolute path of a folder, got {settings.folder!r}"
            )
        for name in _OF_ACTORS:
            if settings.drafts == "engine" and name in values:
                raise ValueError(
                    f"{source}.{name}: expected it with {source}.drafts=actors only, got "
                    f"{values[name]!r} for an engine that keeps the drafts itself"
                )
        try:
            _ = settings.rule
        except ValueError as error:
            raise ValueError(f"{source}.{error}") from None
        return settings


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
