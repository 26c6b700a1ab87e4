"""Corrections for tokens that an older policy drew, by name (`train.correction`).

Reused tokens are scored anew, so the clipped ratio sees them as drawn by the current policy. These
look at who drew them instead (`Rollouts.behaviour_logprobs`, `ages`).
"""

from __future__ import annotations

import math

import torch

from spec_rollout.types import Rollouts


def origins_of(rollouts: Rollouts, correction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Behaviour log-probs of the tokens, and which of them were reused.

    Returns:
        [num_response_tokens], float32; [num_response_tokens], bool.

    Raises:
        ValueError: if the rollouts do not say.
    """
    behaviour, ages = rollouts.behaviour_logprobs, rollouts.ages
    if behaviour is None or ages is None:
        raise ValueError(
            "rollouts.behaviour_logprobs: expected them, with ages, for train.correction = "
            f"{correction!r}, got None (rollouts cached without log-probs, perhaps)"
        )
    return behaviour, ages > 0


def clipped_behaviour(
    old_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor, reused: torch.Tensor
) -> torch.Tensor:
    """Old log-probs of the clipped ratio: of a reused token those of the policy that drew it.

    The ratio is then new / behaviour, so the clip range holds the policy to what drew the token.
    All are [num_tokens]; `reused` is bool.
    """
    return torch.where(reused, behaviour_logprobs, old_logprobs)


def truncated(
    old_logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    reused: torch.Tensor,
    cap: float,
) -> torch.Tensor:
    """Weight of each token's policy loss: min(cap, p_old / p_behaviour), of a fresh one 1.

    Truncated importance sampling (Espeholt et al., 2018, arXiv 1802.01561). Where drafts are kept
    unseen (an infinite lenience, the baselines), a token is from q = p_behaviour given those before
    it, and the expectation is that under p = p_old but for the cap, which bounds the variance.
    Under a finite lenience l the tokens have passed a test: of a draft of the last epoch they have
    the density min(q, l p), and with the weight count min(p, l p^2 / q). That is less than p where
    l p < q: the weight comes on top of the test, and is no correction of its bias.

    All are [num_tokens]; `reused` is bool.
    """
    log_ratio = (old_logprobs - behaviour_logprobs).clamp(max=math.log(cap))
    return torch.where(reused, log_ratio.exp(), torch.ones_like(log_ratio))
