"""Published settings of each algorithm (SPEC-RL, arXiv 2509.23232, appendix A.1).

What a config leaves out is taken from here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """Settings that differ from algorithm to algorithm.

    Attributes:
        log_lenience: Of the rule lenient.
        lr, critic_lr: Of the policy, and of a value head.
        kl_coef: Weight of the KL to the reference.
        clip_low, clip_high: Distances of the clip range from 1.
    """

    log_lenience: float
    lr: float = 5e-7
    critic_lr: float = 1e-5
    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2


PUBLISHED = {
    "grpo": Published(log_lenience=0.5, kl_coef=1e-4),
    "ppo": Published(log_lenience=0.3),
    "dapo": Published(log_lenience=0.15, clip_high=0.28),
}


def published(algorithm: str) -> Published:
    """Of an algorithm by name; one of the user's own has GRPO's, without a KL."""
    return PUBLISHED.get(algorithm, Published(log_lenience=0.5))
