"""History drafting: proposes tokens from earlier rollouts, and decides how many are worth it."""

from spec_rollout.drafting.drafter import Drafter, DrafterInfo, MatchShares, Proposals
from spec_rollout.drafting.history import HistoryDrafter
from spec_rollout.drafting.history_file import NO_TAG, KeptRows
from spec_rollout.drafting.history_folder import HistoryFolder, HistoryIdentity
from spec_rollout.drafting.noise import NoiseLaw
from spec_rollout.drafting.payoff import Payoff
from spec_rollout.drafting.step_cost import StepCost

__all__ = [
    "NO_TAG",
    "Drafter",
    "DrafterInfo",
    "HistoryDrafter",
    "HistoryFolder",
    "HistoryIdentity",
    "KeptRows",
    "MatchShares",
    "NoiseLaw",
    "Payoff",
    "Proposals",
    "StepCost",
]
