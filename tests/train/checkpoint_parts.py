"""A model some optimizer steps in, with a cache, to be saved and restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from test_batching import make_rollouts

from spec_rollout.cache import RolloutCache
from spec_rollout.config.sections import ModelConfig, TrainConfig
from spec_rollout.keys import prompt_key
from spec_rollout.loading.policy import load_policy
from spec_rollout.train.checkpoint import TrainState, save_checkpoint
from spec_rollout.train.update import make_optimizer


class Parts:
    """Everything that a checkpoint is made of."""

    def __init__(self, model_dir: Path, *, steps: int = 0) -> None:
        self.policy = load_policy(ModelConfig(str(model_dir), device="cpu"))
        self.model = copy.deepcopy(self.policy.model)
        self.optimizer = make_optimizer(self.model, TrainConfig(lr=0.01))
        self.cache = RolloutCache()
        for _ in range(steps):
            self.train()

    def train(self) -> torch.Tensor:
        ids = torch.randint(3, 40, (2, 5))  # from torch's generator, which a checkpoint restores
        loss = self.model(ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def fill_cache(self) -> None:
        keys = [prompt_key([1, 2]), prompt_key([3])]
        self.cache.store(keys, [0, 0], make_rollouts([2, 1], [4, 6]))

    def save(
        self,
        root: Path,
        step: int = 1,
        keep_last: int | None = 2,
        pending: dict[str, Any] | None = None,
        **state: Any,
    ) -> Path:
        return save_checkpoint(
            root,
            TrainState(step, "abc", pending, **state),
            model=self.model,
            tokenizer=self.policy.tokenizer,
            optimizer=self.optimizer,
            cache=self.cache,
            keep_last=keep_last,
        )
