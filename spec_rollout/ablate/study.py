"""A grid of variants and seeds: defined once, trained run by run, gone on with after any end."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spec_rollout.ablate.grid import Changes, changed
from spec_rollout.ablate.inputs import MODEL, ROWS, Inputs
from spec_rollout.config.sections import ConfigError, RolloutConfig, RunConfig
from spec_rollout.config.toml import to_dict
from spec_rollout.runs.files import write_atomically

DEFINITION = "grid.toml"
_INPUTS = "inputs"  # table of the definition


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared.

    Attributes:
        base: Config of every run.
        variants: What each changes, by "section.key"; the first one is what others are compared
            with.
        seeds: Each variant is trained with each.
        out: Folder of everything; a run's is `out`/seed-N/VARIANT.
    """

    base: RunConfig
    variants: Mapping[str, Changes]
    seeds: Sequence[int]
    out: Path

    def folder(self, seed: int, variant: str) -> Path:
        """Of a run."""
        return self.out / f"seed-{seed}" / variant

    def runs(self) -> Iterator[tuple[int, str]]:
        """All runs: seed by seed, so that what is there early compares all variants."""
        for seed in self.seeds:
            for variant in self.variants:
                yield seed, variant

    def config(self, seed: int, variant: str) -> RunConfig:
        """Of a run.

        Before training all variants of a seed have the same weights and are judged with the same
        noise, so only the first one is. A finished run needs no checkpoint.

        Raises:
            ConfigError: naming a key.
        """
        config = changed(
            self.base,
            {
                **self.variants[variant],
                "train.seed": seed,
                "log.run_dir": str(self.folder(seed, variant)),
                "log.progress": "off",
                "checkpoint.at_end": False,
            },
        )
        if variant != next(iter(self.variants)):
            config = replace(config, eval=replace(config.eval, at_start=False))
        return config

    def definition(self) -> dict[str, Any]:
        """What makes the grid this one and no other; for TOML. Where it is, is no part of it."""
        base = to_dict(self.base)
        base["log"].pop("run_dir", None)
        return {
            "seeds": list(self.seeds),
            "variants": {name: dict(changes) for name, changes in self.variants.items()},
            "base": base,
        }


def begin(study: Study) -> bool:
    """Writes the definition of a new grid, or checks that of the one that is there.

    Returns:
        Whether there was one.

    Raises:
        ConfigError: for a variant that does not fit, or runs that would share a store of rollouts,
            before anything is written.
        ValueError: if the folder holds something else, or another grid.
    """
    import tomli_w

    stores: set[str] = set()
    for seed, variant in study.runs():
        try:
            rollout = study.config(seed, variant).rollout
            _check_own_store(rollout, stores)
        except ValueError as error:
            raise type(error)(f"{variant}: {error}") from None
    path = study.out / DEFINITION
    if path.is_file():
        _check_same(tomllib.loads(path.read_text(encoding="utf-8")), study)
        return True
    if study.out.is_dir() and any(study.out.glob("seed-*")):
        raise ValueError(
            f"--out: expected a new folder or one with a {DEFINITION}, got {study.out} with runs "
            "and no definition"
        )
    study.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, tomli_w.dumps(study.definition()))
    return False


def check_inputs(study: Study, inputs: Inputs) -> bool:
    """Notes in the definition what the runs read, or checks that it is what was noted.

    Args:
        inputs: From `inputs_of`.

    Returns:
        Whether anything had been noted. Definitions of older versions lack it.

    Raises:
        ValueError: naming the data or the model that is another now.
    """
    import tomli_w

    path = study.out / DEFINITION
    definition = tomllib.loads(path.read_text(encoding="utf-8"))
    known = definition.get(_INPUTS, {})
    for kind, what in ((ROWS, "the rows"), (MODEL, "the model")):
        for name, fingerprint in inputs[kind].items():
            before = known.get(kind, {}).get(name, fingerprint)
            if before != fingerprint:
                raise ValueError(
                    f"--out: expected {what} that the grid in {study.out} was begun with in "
                    f"{name!r} (fingerprint {before}), got {fingerprint}; another grid needs "
                    "another folder"
                )
    noted = {kind: {**known.get(kind, {}), **inputs[kind]} for kind in inputs}
    if noted != known:
        write_atomically(path, tomli_w.dumps({**definition, _INPUTS: noted}))
    return bool(known)


def _check_own_store(rollout: RolloutConfig, stores: set[str]) -> None:
    """ConfigError if a run before this one has its store; a run begins with an empty one."""
    if rollout.cache_store == "ray":
        key, store = "cache_ray", rollout.cache_ray
        expected = "a pool of actors for each run, or another cache_store"
    else:
        key, store = "cache_folder", rollout.cache_folder
        expected = "to be left out, so that each run has a store in its own folder"
    if store is None:
        return
    if store in stores:
        raise ConfigError(f"rollout.{key}: expected {expected}, got {store!r} for several runs")
    stores.add(store)


def _check_same(known: Mapping[str, Any], study: Study) -> None:
    known = {key: value for key, value in known.items() if key != _INPUTS}
    old, new = _flat(known), _flat(study.definition())
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"--out: expected the grid that was begun in {study.out} ({DEFINITION}), got "
                f"{key} = {new.get(key, 'left out')!r} instead of {old.get(key, 'left out')!r}; "
                "another grid needs another folder"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(_flat(inner, f"{prefix}{key}."))
    return found
