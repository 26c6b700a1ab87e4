"""The rollout cache that a run begins or goes on with."""

from __future__ import annotations

from pathlib import Path

from spec_rollout.cache import RolloutCache
from spec_rollout.config.sections import ConfigError, RunConfig
from spec_rollout.train.step_store import StepStore


def load_cache(config: RunConfig, store: StepStore, *, fresh: bool) -> RolloutCache:
    """The cache of a run, with the rollouts of `rollout.cache_path` if it begins.

    Raises:
        ConfigError: if that file is damaged, or of no use under the rule.
    """
    rollout = config.rollout
    keep_logprobs = rollout.acceptance().needs_draft_logprobs
    cache = RolloutCache(
        rollout.cache_max_bytes,
        keep_logprobs=keep_logprobs,
        keep_behaviour=True,
        store=store,
        writer=store.writer,
    )
    if fresh and rollout.cache_path is not None:
        path = Path(rollout.cache_path)
        if not path.is_file():
            found = "a folder" if path.is_dir() else "nothing"
            raise ConfigError(
                f"rollout.cache_path: expected a cache file, found {found} at {str(path)!r}"
            )
        try:
            cache.load(path)
        except ValueError as error:
            raise ConfigError(f"rollout.cache_path: {error}") from error
        if _lacks_logprobs(config, store):
            raise ConfigError(
                f"rollout.cache_path: expected rollouts with log-probs, which rollout.rule = "
                f"{rollout.rule!r} reads, found some without in {str(path)!r} (kept under a rule "
                "that reads none)"
            )
    return cache


def _lacks_logprobs(config: RunConfig, store: StepStore) -> bool:
    """Whether a cached rollout lacks the log-probs that the rule reads."""
    if not (config.rollout.reuse and config.rollout.acceptance().needs_draft_logprobs):
        return False
    return any(
        entry.logprobs is None for _, samples in store.iterate() for entry in samples.values()
    )


def without_logprobs(config: RunConfig, store: StepStore) -> tuple[str, ...]:
    """Of a run resumed under another rule: forgets rollouts that this one cannot use."""
    if not _lacks_logprobs(config, store):
        return ()
    groups = [
        (key, {i: entry for i, entry in samples.items() if entry.logprobs is not None})
        for key, samples in store.iterate()
    ]
    store.replace_all(groups)
    return (
        "rollout.rule: the rollouts so far were kept without the log-probs that "
        f"{config.rollout.rule!r} reads; they are not reused",
    )
