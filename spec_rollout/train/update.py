"""One policy update from a batch of rollouts: minibatches, micro-batches, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from spec_rollout.config.sections import TrainConfig
from spec_rollout.train.algorithms.base import Advantages, Algorithm, LossInputs
from spec_rollout.train.algorithms.losses import logprobs_and_entropy
from spec_rollout.train.batching import MicroBatch, micro_batches
from spec_rollout.train.corrections import clipped_behaviour, origins_of, truncated
from spec_rollout.train.finite import nonfinite
from spec_rollout.train.forward import response_outputs
from spec_rollout.train.memory import TrainingForward
from spec_rollout.train.update_result import TokenSums, UpdateResult
from spec_rollout.train.value_head import ValueHead
from spec_rollout.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Updates in a row of which nothing was finite, after which it is no accident.
_MOST_BARREN = 10


class DivergedError(ValueError):
    """Weights, or gradients for many steps, are not finite; the message says which."""


def make_optimizer(
    model: torch.nn.Module, config: TrainConfig, value_head: ValueHead | None = None
) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; weight decay spares vectors (norms, biases).

    The value head's have a learning rate of their own. `base_lr` of a group is that after warm-up.
    """
    numbers = config.numbers()
    groups = []
    for parameters, lr in (
        (_trainable(model), numbers.lr),
        ([] if value_head is None else _head_parameters(value_head), numbers.critic_lr),
    ):
        matrices = [(name, p) for name, p in parameters if p.dim() >= 2]
        vectors = [(name, p) for name, p in parameters if p.dim() < 2]
        rate = {"lr": lr, "base_lr": lr}
        groups += [
            {"params": matrices, "weight_decay": config.weight_decay, **rate},
            {"params": vectors, "weight_decay": 0.0, **rate},
        ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=numbers.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _head_parameters(value_head: ValueHead) -> list[tuple[str, torch.nn.Parameter]]:
    return list(value_head.named_parameters(prefix="value_head"))


def warm_up(config: TrainConfig, step: int) -> float:
    """Share of the learning rate: linear at first, then 1; `step` is 0-based."""
    return min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the policy; constant after a linear warm-up; `step` is 0-based."""
    return config.numbers().lr * warm_up(config, step)


class PolicyUpdater:
    """Updates a policy in place.

    Args:
        model: The policy, in eval mode.
        optimizer: Over its parameters.
        config: See `TrainConfig`.
        algorithm: Gives the loss.
        temperature: Of the sampling distribution that the rollouts' log-probs are of.
        max_tokens: Longest response allowed.
        filtered: Sampling has top-k or top-p: the rollouts' log-probs are of another distribution
            than the trainer's.
        reference: Frozen model; None unless the algorithm needs one.
        value_head: Its parameters are the optimizer's, too; None unless the algorithm needs one.

    Attributes:
        num_begun: Optimizer steps begun so far. Whatever is raised before the first one of an
            update leaves weights and moments as they were.

    Raises:
        ValueError: if the algorithm needs what is not there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        algorithm: Algorithm,
        *,
        temperature: float,
        max_tokens: int,
        filtered: bool = False,
        reference: PreTrainedModel | None = None,
        value_head: ValueHead | None = None,
    ) -> None:
        for name, needed, given in (
            ("reference", algorithm.needs.reference, reference),
            ("value_head", algorithm.needs.values, value_head),
        ):
            if needed and given is None:
                raise ValueError(
                    f"{name}: expected a model, which {type(algorithm).__name__} needs, got None"
                )
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._forward_mode = TrainingForward(config)
        self._algorithm = algorithm
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._filtered = filtered
        self._reference = reference
        self._value_head = value_head
        policy = _trainable(model)
        head = [] if value_head is None else _head_parameters(value_head)
        self._named = policy + head
        self._parameters = [parameter for _, parameter in self._named]
        # Clipped each for itself: a value head that still learns would slow the policy down.
        self._clipped = [[p for _, p in part] for part in (policy, head) if part]
        self.num_begun = 0
        self._num_barren = 0
        self._device = next(model.parameters()).device

    def update(
        self,
        rollouts: Rollouts,
        trained: Advantages,
        groups: Sequence[Sequence[int]],
        *,
        step: int,
        values: torch.Tensor | None = None,
    ) -> UpdateResult:
        """One pass over a batch.

        Args:
            rollouts: With the engine's log-probs.
            trained: What the algorithm made of the rewards.
            groups: Rows of each prompt that count (rewarded ones, with a response); a minibatch
                takes whole groups.
            step: 0-based, for the learning rate.
            values: What `values` gave; None without a value head.

        Raises:
            ValueError: if there is not one advantage per token, an old log-prob of these rows is
                not finite, or `train.correction` needs what the rollouts do not say.
            DivergedError: if weights are not finite afterwards, or no gradient of the last ten
                updates was.
        """
        for name, tensor in (("advantages", trained.advantages), ("returns", trained.returns)):
            if tensor is not None and tensor.shape != rollouts.logprobs.shape:
                raise ValueError(
                    f"{name}: expected shape {list(rollouts.logprobs.shape)} (one per response "
                    f"token), got {list(tensor.shape)}"
                )
        config = self._config
        lr, warm = learning_rate(config, step), warm_up(config, step)
        for group in self._optimizer.param_groups:
            group["lr"] = group.get("base_lr", config.numbers().lr) * warm
        all_rows = [row for group in groups for row in group]
        old_logprobs = rollouts.logprobs
        if self._algorithm.needs.recomputed_logprobs:
            # A rule that keeps drafts unseen keeps tokens that top-k or top-p leave out by now. The
            # trainer's distribution is the whole one, in which they are as possible as any.
            possible = old_logprobs.masked_fill(old_logprobs.isneginf(), 0.0)
            _check_logprobs("rollouts.logprobs", "engine", possible, rollouts, all_rows)
            old_logprobs = self._recompute(rollouts, all_rows)
            _check_logprobs("train.recompute_logprobs", "trainer", old_logprobs, rollouts, all_rows)
        else:
            _check_logprobs("rollouts.logprobs", "engine", old_logprobs, rollouts, all_rows)
        importance = None
        if config.correction != "none":
            behaviour, reused = origins_of(rollouts, config.correction)
            if config.correction == "clipped_behaviour":
                old_logprobs = clipped_behaviour(old_logprobs, behaviour, reused)
            else:
                importance = truncated(old_logprobs, behaviour, reused, config.correction_cap)

        sums = TokenSums(("entropy", *self._algorithm.sum_names), self._device)
        losses: list[float] = []
        norms: list[float] = []
        skipped = 0
        num_parts = min(config.minibatches, len(groups))
        for part in range(num_parts):
            first, end = (i * len(groups) // num_parts for i in (part, part + 1))
            rows = [row for group in groups[first:end] for row in group]
            if not rows:
                continue
            losses.append(
                self._accumulate(
                    rollouts,
                    old_logprobs,
                    importance,
                    trained,
                    values,
                    rows,
                    sums,
                    first=not losses,
                )
            )
            most = math.inf if config.grad_clip is None else config.grad_clip
            part_norms = [
                float(torch.nn.utils.clip_grad_norm_(part, most)) for part in self._clipped
            ]
            if all(map(math.isfinite, part_norms)):
                self.num_begun += 1
                self._optimizer.step()
                norms.append(part_norms[0])
            else:
                skipped += 1
        self._optimizer.zero_grad(set_to_none=True)
        problem = nonfinite(self._named)
        if problem is not None:
            raise DivergedError(
                f"train: expected finite weights after the update of step {step + 1}, got "
                f"{problem}; a smaller train.lr may help, or model.dtype = 'float32'"
            )
        self._num_barren = self._num_barren + 1 if skipped and not norms else 0
        if self._num_barren >= _MOST_BARREN:
            raise DivergedError(
                f"train: expected finite gradients, got none in the last {_MOST_BARREN} steps up "
                f"to step {step + 1}: nothing is learned any more"
            )
        return sums.result(losses, norms, lr, skipped)

    @torch.no_grad()
    def values(self, rollouts: Rollouts) -> torch.Tensor | None:
        """What the value head says before each response token is drawn.

        Returns:
            [num_response_tokens], float32, on the CPU; None without a value head.
        """
        if self._value_head is None:
            return None
        result = torch.zeros_like(rollouts.logprobs)
        rows = (rollouts.response_lens > 0).nonzero().flatten().tolist()
        for batch in self._batches(rollouts, rows):
            with self._forward_mode.of(self._model):
                _, hidden = response_outputs(self._model, batch.input_ids, batch.positions)
            result[batch.token_index] = self._value_head(hidden).cpu()
        return result

    def _accumulate(
        self,
        rollouts: Rollouts,
        old_logprobs: torch.Tensor,
        importance: torch.Tensor | None,
        trained: Advantages,
        values: torch.Tensor | None,
        rows: list[int],
        sums: TokenSums,
        *,
        first: bool,
    ) -> float:
        """Gradients of one minibatch into `.grad`; its loss."""
        weights = torch.zeros(rollouts.batch, dtype=torch.float32)
        weights[rows] = self._algorithm.token_weights(
            rollouts.response_lens[rows], self._max_tokens
        )
        if self._config.skip_zero_advantage:
            cu = rollouts.cu_response_lens
            rows = [row for row in rows if bool(trained.advantages[cu[row] : cu[row + 1]].any())]
        # Zeros, not None: without any gradient AdamW must still decay its moments.
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._device)
        for batch in self._batches(rollouts, rows):
            logprobs, entropy, hidden = self._forward(self._model, batch)
            ref_logprobs = None
            if self._reference is not None:
                with torch.no_grad():
                    ref_logprobs, _, _ = self._forward(self._reference, batch)

            def of_batch(
                per_token: torch.Tensor | None, batch: MicroBatch = batch
            ) -> torch.Tensor | None:
                return None if per_token is None else per_token[batch.token_index].to(self._device)

            inputs = LossInputs(
                logprobs,
                old_logprobs[batch.token_index].to(self._device),
                trained.advantages[batch.token_index].to(self._device),
                weights[batch.token_rows].to(self._device),
                ref_logprobs,
                values=None if self._value_head is None else self._value_head(hidden),
                old_values=of_batch(values),
                returns=of_batch(trained.returns),
                importance=of_batch(importance),
            )
            out = self._algorithm.loss(inputs)
            out.loss.backward()
            loss_sum += out.loss.detach()
            sums.add({"entropy": entropy.sum(), **out.sums}, logprobs.numel())
            if first and not self._filtered:
                engine = rollouts.logprobs[batch.token_index].to(self._device)
                sums.add_gap(engine, logprobs.detach())
        return float(loss_sum)

    def _batches(self, rollouts: Rollouts, rows: list[int]) -> Iterable[MicroBatch]:
        for batch in micro_batches(rollouts, rows, self._config.micro_batch_tokens):
            yield batch.to(self._device)

    def _forward(
        self, model: PreTrainedModel, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs and entropy of the response tokens, and what the output head read there."""
        with self._forward_mode.of(model):
            logits, hidden = response_outputs(model, batch.input_ids, batch.positions)
        return *logprobs_and_entropy(logits, batch.token_ids, self._temperature), hidden

    def logprobs(self, rollouts: Rollouts) -> torch.Tensor:
        """Of every response token under the policy as it is now. [num_response_tokens], float32."""
        return self._recompute(rollouts, list(range(rollouts.batch)))

    @torch.no_grad()
    def _recompute(self, rollouts: Rollouts, rows: list[int]) -> torch.Tensor:
        result = rollouts.logprobs.clone()
        for batch in self._batches(rollouts, rows):
            result[batch.token_index] = self._forward(self._model, batch)[0].cpu()
        return result


def _check_logprobs(
    key: str, whose: str, logprobs: torch.Tensor, rollouts: Rollouts, rows: list[int]
) -> None:
    """A NaN would not show in the gradient: clamping the ratio gives it none."""
    bad = (~torch.isfinite(logprobs)).nonzero().flatten()
    if not bad.numel():
        return
    for row, index in zip(
        (torch.searchsorted(rollouts.cu_response_lens, bad, right=True) - 1).tolist(),
        bad,
        strict=True,
    ):
        if row in rows:
            raise ValueError(
                f"{key}: expected finite numbers from the {whose}, got {float(logprobs[index])} in "
                f"row {row}"
            )
