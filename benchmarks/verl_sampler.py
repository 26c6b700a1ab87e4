"""verl's own sampler, for runs whose rollouts take less than the two seconds that it waits."""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_SECONDS = 0.02


class EagerSampler(ReplayBuffer):
    """Looks every 20 ms for finished rollouts; otherwise all times of verl's are multiples of 2 s.

    verl loads it by `trainer.v1.sampler.custom_sampler`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, poll_interval=POLL_SECONDS)
