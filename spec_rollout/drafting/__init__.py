"""Where proposals come from after a draft is spent, and how many are worth computing."""

from spec_rollout.drafting.history import HistoryDrafter, MatchShares, Proposals
from spec_rollout.drafting.payoff import Payoff
from spec_rollout.drafting.step_cost import StepCost

__all__ = ["HistoryDrafter", "MatchShares", "Payoff", "Proposals", "StepCost"]
