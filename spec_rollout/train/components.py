"""Everything a run needs, loaded and checked before anything is written."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec_rollout.cache import MemoryStore, RolloutCache
from spec_rollout.cache.writer import Writer
from spec_rollout.config.sections import ConfigError, RunConfig
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.loading.data import (
    PromptData,
    PromptOrder,
    PromptRow,
    SourceRow,
    check_identity,
    check_rows,
    read_rows,
    render_rows,
)
from spec_rollout.loading.dropped import Dropped, ModelLength
from spec_rollout.loading.engines import check_engine, make_engine
from spec_rollout.loading.policy import Policy, load_model, load_policy
from spec_rollout.loading.prompts import PromptRenderer
from spec_rollout.rewards.rewards import Rewards
from spec_rollout.rewards.run_context import Progress
from spec_rollout.rollout import RolloutSession
from spec_rollout.runs.loggers import check_loggers
from spec_rollout.train import adapter, algorithms
from spec_rollout.train.checkpoint import CheckpointError, TrainState, load_state, load_tensors
from spec_rollout.train.checks import (
    check_attention,
    check_base,
    check_finite,
    check_forward,
    check_group_size,
    check_order,
    check_reference,
    check_reference_weights,
    check_saving,
    order_settings,
)
from spec_rollout.train.continued import ContinuedEngine
from spec_rollout.train.drafts import load_cache, without_logprobs
from spec_rollout.train.lenience import LenienceController
from spec_rollout.train.memory import check_recomputing
from spec_rollout.train.run_store import check_resumable
from spec_rollout.train.step_store import StepStore
from spec_rollout.train.tensors import rng_state, set_rng_state
from spec_rollout.train.update import PolicyUpdater, make_optimizer
from spec_rollout.train.value_head import ValueHead
from spec_rollout.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Components:
    """The parts of a run.

    Attributes:
        config: As given, with what was settled at the start of the run.
        dropped: Rows left out as too long, of the training data ("train") and the held-out ones
            ("heldout").
        store: What holds the cached rollouts.
        lenience: Holds a budget; None without one.
        eval_rows: Rows to evaluate under "train" and "heldout"; a key without rows is left out.
        state: Where the run stands: the beginning, or a checkpoint.
        total_steps: Steps of the whole run.
        notes: What the user should know, a line each.
    """

    config: RunConfig
    policy: Policy
    data: PromptData
    dropped: dict[str, tuple[Dropped, ...]]
    eval_rows: dict[str, tuple[PromptRow, ...]]
    order: PromptOrder
    rewards: Rewards
    engine: RolloutEngine
    cache: RolloutCache
    session: RolloutSession
    optimizer: torch.optim.Optimizer
    algorithm: algorithms.Algorithm
    value_head: ValueHead | None
    updater: PolicyUpdater
    sampling: SamplingParams
    eval_sampling: SamplingParams
    store: StepStore
    lenience: LenienceController | None
    state: TrainState
    total_steps: int
    notes: tuple[str, ...]

    def progress(self, step: int) -> Progress:
        """What rewards are told of the run after `step` updates."""
        return Progress(step, self.total_steps, float(self.order.epoch_of(step)))

    def rounding_state(self) -> dict[str, Any]:
        """See `TrainState.rounding`."""
        rounding = self.session.rounding
        if rounding is None:
            return {}
        return {_engine_name(self.config, self.policy, self.engine): rounding.state()}


def build(
    config: RunConfig, checkpoint: Path | None = None, *, whole_length: bool = False
) -> Components:
    """Loads and checks everything; writes nothing.

    Args:
        config: The run.
        checkpoint: Folder of a checkpoint to continue from.
        whole_length: The engine takes rows as long as the model does, not only as long as the
            config's own prompts and responses: for other ones than these.

    Raises:
        ConfigError, DataError, CheckpointError, ValueError: naming what was expected and what was
            found.
    """
    config = config.settled()
    check_engine(config.rollout, config.model.attention)
    check_attention(config)
    check_loggers(config.log)
    adapter.check_peft(config.model)
    algorithm = algorithms.make(config.train)
    check_group_size(config, algorithm)
    state = None if checkpoint is None else load_state(checkpoint)
    settings = order_settings(config)
    if state is not None:
        check_order(settings, state)
    # Before the model, which takes longer: a mistake in data or rewards shows at once.
    sources = read_data(config)
    rewards = Rewards(config.reward, sources["train"][0].columns)
    for rows in sources.values():
        check_rows(rows, rewards)
        check_identity(rows)
    model_config = config.model
    if checkpoint is not None:
        model_config = replace(config.model, path=str(checkpoint / "model"))
    # A store on disk or in actors takes its place when the run starts (`run_store`).
    store = StepStore(MemoryStore(), None if config.rollout.cache_store == "memory" else Writer())
    cache = load_cache(config, store, fresh=checkpoint is None)
    # Of a run of the same seed, they were drawn with the noise of the same steps.
    noise_offset = cache.fingerprint() if state is None else state.noise_offset
    _seed_everything(config.train.seed)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    has_adapter = config.model.lora_rank is not None
    # A checkpoint's model has the adapter merged into it; vLLM loads that.
    policy = load_policy(config.model if has_adapter else model_config)
    base = ""
    base_notes: tuple[str, ...] = ()
    if has_adapter:
        base = adapter.fingerprint(policy.model)
        if state is not None:
            base_notes = check_base(base, state, config)
        adapter.add_adapter(policy.model, config.model)
        if checkpoint is not None:
            adapter.load_adapter(checkpoint, policy.model)
    check_finite(policy.model, model_config.path, "model.path")
    check_saving(policy.model, model_config.path)
    policy = limited(policy, config)
    if config.rollout.check_model:
        check_forward(policy, config.train)
    if config.train.gradient_checkpointing:
        check_recomputing(policy.model, config.train)
    rendered = render_data(config, sources, policy)
    data, eval_rows = rendered["train"], _eval_rows(config, rendered)
    heldout_fingerprint = rendered["heldout"].fingerprint if "heldout" in rendered else ""
    notes = base_notes + data.notes
    notes += tuple(note for part in rendered.values() for note in part.row_notes)
    if config.data.template_time is None and data.template_time is not None:
        config = replace(config, data=replace(config.data, template_time=data.template_time))
    if state is not None and state.data_fingerprint != data.fingerprint:
        raise CheckpointError(
            f"data.path: expected the prompts that the checkpoint {str(checkpoint)!r} was trained "
            f"on, with their answers (fingerprint {state.data_fingerprint}), got others in "
            f"{config.data.path!r} ({data.fingerprint})"
        )
    if state is not None and state.data_rendering != data.rendering:
        notes += (
            f"{config.data.path}: the rows are the same, but their token ids are not those of the "
            "run's start (another version of the tokenizer, or data.template_time)",
        )
    if state is not None and state.heldout_fingerprint != heldout_fingerprint:
        notes += (
            f"eval.path: {config.eval.path!r} has other held-out prompts than the run had so far; "
            "its accuracies are not comparable with the earlier ones",
        )
    train = config.train
    order = PromptOrder(
        len(data), train.prompts_per_step, seed=train.seed, shuffle=config.data.shuffle
    )
    sampling = config.rollout.sampling(_stop_token_ids(config, policy))
    eval_temperature = config.eval.temperature
    if eval_temperature is None:
        eval_temperature = sampling.temperature
    value_head = ValueHead(policy.model) if algorithm.needs.values else None
    optimizer = make_optimizer(policy.model, train, value_head)
    if checkpoint is not None:
        notes += check_resumable(config, Path(config.log.run_dir), checkpoint)
        load_tensors(checkpoint, optimizer, cache, value_head)
        notes += without_logprobs(config, store)
    reference = None
    reference_weights = "" if state is None else state.reference_fingerprint
    if algorithm.needs.reference:
        path, key = config.model.path, "model.path"
        if config.model.reference is not None:
            path, key = config.model.reference, "model.reference"
        device = next(policy.model.parameters()).device
        reference = load_model(path, config.model, device, key).requires_grad_(False)
        check_finite(reference, path, key)
        check_reference(reference, policy, key)
        reference_weights = adapter.fingerprint(reference)
        if state is not None:
            notes += check_reference_weights(reference_weights, state, path, key)
    prompts = [row.prompt_ids for rows in (data.rows, *eval_rows.values()) for row in rows]
    # Rewards may draw from the process's generators; vLLM in this process seeds them.
    random_states = rng_state()
    rollout = config.rollout
    if whole_length:
        rollout = replace(rollout, max_model_len=policy.max_length)
    engine: RolloutEngine = make_engine(
        rollout,
        config.vllm,
        model_config,
        policy,
        longest_prompt=max(map(len, prompts)),
    )
    set_rng_state(random_states)
    if state is not None:
        engine = ContinuedEngine(engine, state.step)
    session = RolloutSession(
        engine,
        config.rollout.schedule(),
        cache=cache,
        seed=train.seed,
        refresh_epochs=config.rollout.refresh_epochs,
        reuse=config.rollout.reuse,
        drafting=config.rollout.drafting,
        fresh_share=config.rollout.fresh_share,
        max_age=config.rollout.max_age,
        noise_offset=noise_offset,
    )
    if state is not None:
        session.rounding = state.rounding_of(_engine_name(config, policy, engine))
    lenience = None
    if config.rollout.lenience_budget is not None:
        lenience = LenienceController(config.rollout)
        if state is not None:
            lenience.restore(state.lenience)
    by_epochs = None if train.epochs is None else train.epochs * order.steps_per_epoch
    return Components(
        config=config,
        policy=policy,
        data=data,
        dropped={name: part.dropped for name, part in rendered.items()},
        eval_rows=eval_rows,
        order=order,
        rewards=rewards,
        engine=engine,
        cache=cache,
        session=session,
        optimizer=optimizer,
        algorithm=algorithm,
        updater=PolicyUpdater(
            policy.model,
            optimizer,
            train,
            algorithm,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            filtered=sampling.top_k != 0 or sampling.top_p != 1.0,
            reference=reference,
            value_head=value_head,
        ),
        value_head=value_head,
        sampling=sampling,
        eval_sampling=replace(sampling, temperature=eval_temperature, top_k=0, top_p=1.0),
        store=store,
        lenience=lenience,
        state=TrainState(
            0 if state is None else state.step,
            data.fingerprint,
            {"step": 0, "epoch": 0} if state is None else state.pending_row,
            data.rendering,
            heldout_fingerprint,
            settings,
            {} if lenience is None else lenience.state(),
            base_fingerprint=base,
            noise_offset=noise_offset,
            reference_fingerprint=reference_weights,
        ),
        total_steps=min(n for n in (by_epochs, train.max_steps) if n is not None),
        notes=notes,
    )


def _engine_name(config: RunConfig, policy: Policy, engine: RolloutEngine) -> str:
    """What rounding depends on, but for the machine."""
    dtype, device = config.model.dtype, next(policy.model.parameters()).device.type
    temperature = f"temperature {config.rollout.temperature:g}"  # log-probs are after it
    if config.rollout.engine == "vllm":
        return f"vllm, {config.vllm.dtype or dtype}, {device}, {temperature}"
    kind = "batch-invariant" if getattr(engine, "batch_invariant", None) else "padded"
    attention = config.model.attention
    return f"{config.rollout.engine}, {dtype}, {device}, {attention}, {kind}, {temperature}"


def _seed_everything(seed: int) -> None:
    """Rollouts do not depend on these generators: their noise is keyed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (rewards may use it)
    torch.manual_seed(seed % 2**63)


def limited(policy: Policy, config: RunConfig) -> Policy:
    """The policy with the length of rows that the config sets, if it does."""
    if config.rollout.max_model_len is None:
        return policy
    return replace(policy, max_length=config.rollout.max_model_len)


def read_data(config: RunConfig) -> dict[str, list[SourceRow]]:
    """Rows for training and, where there are some, for evaluation only ("train", "heldout")."""
    data = config.data
    columns: dict[str, Any] = {
        "prompt_column": data.prompt_column,
        "answer_column": data.answer_column,
    }
    sources = {"train": read_rows(data.path, **columns, max_rows=data.max_rows)}
    if config.eval.path is not None:
        sources["heldout"] = read_rows(
            config.eval.path, **columns, max_rows=config.eval.num_heldout_prompts
        )
    return sources


def render_data(
    config: RunConfig, sources: Mapping[str, Sequence[SourceRow]], policy: Policy
) -> dict[str, PromptData]:
    """Prompts of what `read_data` read, under the same names."""
    at = config.data.template_time
    now = None if at is None else datetime.fromisoformat(at)
    length = None
    if policy.max_length is not None:
        whose = "the model's" if config.rollout.max_model_len is None else "the config's"
        length = ModelLength(policy.max_length, config.rollout.max_tokens, whose)
    rendered: dict[str, PromptData] = {}
    for name, rows in sources.items():
        renderer = PromptRenderer(
            policy.tokenizer,
            vocab_size=policy.vocab_size,
            chat_template=config.data.chat_template,
            system_prompt=config.data.system_prompt,
            continue_final_message=config.data.continue_final_message,
            now=now,
        )
        now = renderer.now
        path = config.data.path if name == "train" else config.eval.path
        rendered[name] = render_rows(
            rows,
            renderer,
            str(path),
            max_prompt_tokens=config.data.max_prompt_tokens,
            long_prompts=config.data.long_prompts,
            model_length=length,
        )
    return rendered


def _eval_rows(
    config: RunConfig, rendered: Mapping[str, PromptData]
) -> dict[str, tuple[PromptRow, ...]]:
    """Rows to evaluate, of the training data and of the held-out ones, where there are some."""
    parts = {"train": rendered["train"].rows[: config.eval.num_train_prompts]}
    if "heldout" in rendered:
        parts["heldout"] = rendered["heldout"].rows
    return {name: rows for name, rows in parts.items() if rows}


def _stop_token_ids(config: RunConfig, policy: Policy) -> tuple[int, ...]:
    if config.rollout.stop_tokens is None:
        if not policy.eos_token_ids:
            raise ConfigError(
                "rollout.stop_tokens: expected a list, as neither model nor tokenizer names an "
                "end-of-sequence "
                "token ([] lets every response run to rollout.max_tokens), got nothing"
            )
        return policy.eos_token_ids
    vocabulary = policy.tokenizer.get_vocab()
    for token in config.rollout.stop_tokens:
        if token not in vocabulary:
            raise ConfigError(
                f"rollout.stop_tokens: expected tokens of the model's vocabulary, got {token!r}"
            )
    return tuple(sorted({vocabulary[token] for token in config.rollout.stop_tokens}))
