"""verl: every rollout of a run is named, so that it finds what the same sample was last time.

    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=spec_rollout.adapters.verl.ReuseManager

The manager starts verl's own agent-loop workers with two changes: a worker knows which sample of
which prompt it runs, and its client tells the engine. Agent loops stay as they are, verl's own and
those of users, of one turn or many.

What is used of verl is in `CONTRACT`; nothing else in the package knows verl.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from spec_rollout.adapters.draft_pool import save_shards, start_shards
from spec_rollout.adapters.rows import row_user_key
from spec_rollout.adapters.settings import ReuseSettings
from spec_rollout.adapters.turns import KeyedTurn, RepeatableNoise, Reuse, RolloutName, Turn
from spec_rollout.adapters.verl_plugin import TESTED, untested_version
from spec_rollout.engines.vllm.compat import configured_options
from spec_rollout.engines.vllm.options import PROPOSER, VARIABLE, EngineOptions

# Module -> name in it -> parameters that must be there.
CONTRACT: dict[str, dict[str, tuple[str, ...]]] = {
    "verl.trainer.ppo.v1.agent_loop_tq": {
        "AgentLoopManagerTQ.generate_sequences": ("prompts",),
        "AgentLoopWorkerTQ.generate_sequences": ("batch",),
    },
    "verl.experimental.agent_loop.agent_loop": {
        "AgentLoopWorker.__init__": ("config", "llm_client"),
        "AgentLoopWorker._run_agent_loop": ("sampling_params", "trajectory", "kwargs"),
        "AgentLoopManager.__init__": ("config", "llm_client"),
        "AgentLoopManager._init_agent_loop_workers": (),
    },
    "verl.workers.rollout.llm_server": {
        "LLMServerClient.generate": ("request_id", "prompt_ids", "sampling_params"),
        "LLMServerClient._acquire_server": ("request_id",),
        "FullyAsyncLLMServerClient.generate": ("request_id", "prompt_ids", "sampling_params"),
    },
    "verl.workers.rollout.replica": {"TokenOutput": ("token_ids", "log_probs", "extra_fields")},
}

SECTION = "spec_rollout"  # of verl's configuration

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # verl's is WARNING


def unmet_contract(contract: Mapping[str, Mapping[str, tuple[str, ...]]] = CONTRACT) -> list[str]:
    """What of a contract the installed verl does not have; [] if it has all."""
    missing = []
    for module_name, names in contract.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            missing.append(f"{module_name} ({error})")
            continue
        for name, parameters in names.items():
            found: Any = module
            for part in name.split("."):
                found = getattr(undecorated(found), part, None)
            if found is None:
                missing.append(f"{module_name}.{name}")
                continue
            known = inspect.signature(found).parameters
            missing += [f"{module_name}.{name}({p})" for p in parameters if p not in known]
    return missing


def undecorated(value: Any) -> Any:
    """The class that `ray.remote` made an actor class of; anything else as it is."""
    metadata = getattr(value, "__ray_metadata__", None)
    return value if metadata is None else metadata.modified_class.__ray_actor_class__


if importlib.util.find_spec("verl") is None:
    raise ModuleNotFoundError(
        f"verl: expected it installed (this adapter was tested with verl {', '.join(TESTED)}), got "
        "none",
        name="verl",
    )
if _unmet := unmet_contract():
    raise ImportError(
        f"spec_rollout.adapters.verl: expected verl {', '.join(TESTED)}, got one without "
        f"{', '.join(_unmet)}"
    )

from verl.trainer.ppo.v1.agent_loop_tq import (  # noqa: E402 - what is missing is named first
    AgentLoopManagerTQ,
    AgentLoopWorkerTQ,
)

# Of the agent loop that runs, and of the call of `generate` that it is in; a loop is a task.
_NAME: ContextVar[RolloutName | None] = ContextVar("spec_rollout_name", default=None)
_TURN: ContextVar[Turn | None] = ContextVar("spec_rollout_turn", default=None)


def reuse_settings(config: Any) -> ReuseSettings:
    """`+spec_rollout.NAME=VALUE`, checked against the rest of verl's configuration.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    settings = ReuseSettings.from_mapping(dict(config.get(SECTION) or {}), source=SECTION)
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != "vllm":
        raise ValueError(f"actor_rollout_ref.rollout.name: expected vllm, got {rollout.name}")
    backend = (rollout.get("checkpoint_engine") or {}).get("backend")
    if backend == "delta_sharded":
        raise ValueError(
            "actor_rollout_ref.rollout.checkpoint_engine.backend: expected another than "
            "delta_sharded, which refuses engines with a speculative config"
        )
    options = engine_options(config)
    if settings.drafts == "engine" and options.mode not in ("coupled", "lenient"):
        raise ValueError(
            f"{VARIABLE}: expected coupled or lenient with drafts kept by the engine, got "
            f"{options.mode}"
        )
    speculative = _engine_kwargs(config).get("speculative_config") or {}
    if not options.is_on and speculative.get("model") != PROPOSER:
        raise ValueError(
            f"{VARIABLE}: expected drafting with drafts kept by actors (or an engine with the "
            f"speculative_config of {PROPOSER}), got off"
        )
    return settings


def engine_options(config: Any) -> EngineOptions:
    """What the rollout engine does by itself: by its own arguments, else by the variable.

    Raises:
        ValueError: naming the option.
    """
    options = configured_options(_engine_kwargs(config).get("additional_config"))
    return EngineOptions.from_environment() if options is None else options


def _engine_kwargs(config: Any) -> dict[str, Any]:
    return dict((config.actor_rollout_ref.rollout.get("engine_kwargs") or {}).get("vllm") or {})


def _max_chunk(config: Any) -> int:
    speculative = _engine_kwargs(config).get("speculative_config") or {}
    return int(speculative.get("num_speculative_tokens") or engine_options(config).max_proposal)


def repeated_seed(config: Any) -> int | None:
    """Of a job whose runs are to be alike; None where they need not be."""
    rollout = config.actor_rollout_ref.rollout
    return int(rollout.get("seed", 0)) if rollout.get("full_determinism", False) else None


def rollout_name(trajectory: Mapping[str, Any], row: Mapping[str, Any]) -> RolloutName:
    """Of what verl hands to an agent loop.

    `uid` is new in every epoch. `index` is 0 where the data has none: the prompt's content, which
    is part of every key, tells rows apart then.
    """
    step = int(row.get("global_steps", trajectory["step"]))
    return RolloutName(
        user_key=row_user_key(row.get("data_source", ""), row.get("index", 0)),
        sample=int(row["session_id"]),
        step=max(step, 0),
        is_validation=bool(trajectory["validate"]),
    )


class _Server:
    """A server as a request sees it that is sent to it: its parameters say what its turn says."""

    def __init__(self, server: Any, reuse: Reuse) -> None:
        self._server, self._reuse = server, reuse
        self.generate = self

    def remote(self, **request: Any) -> Any:
        if (turn := _TURN.get()) is not None:
            params = dict(request["sampling_params"])  # a prompt's rollouts share theirs
            extra = self._reuse.extra_args(turn, list(request["prompt_ids"]))
            params["extra_args"] = {**(params.get("extra_args") or {}), **extra}
            # With `full_determinism` verl gives a request without a seed its own, the same for all
            # samples of a prompt, and Model Runner V2 draws by that before any name or key.
            params.setdefault("seed", None)
            if isinstance(turn, KeyedTurn) and turn.store_as is not None:
                params["logprobs"] = True
            request["sampling_params"] = params
        return self._server.generate.remote(**request)


def naming_client(client: Any, reuse: Reuse) -> Any:
    """A copy of verl's client whose requests say whose they are.

    Args:
        client: `LLMServerClient` or a class derived from it. One that sends aborted requests again
            asks for a server each time, and so says it of each.
        reuse: Of the worker.
    """
    base: Any = type(client)

    class NamingClient(base):
        async def generate(
            self, request_id: Any, *, prompt_ids: Any, sampling_params: Any, **rest: Any
        ) -> Any:
            name = _NAME.get()
            media = ("image_data", "video_data", "audio_data")
            has_media = any(rest.get(kind) is not None for kind in media)
            turn = await reuse.begin(name, list(prompt_ids), sampling_params, has_media)
            token = _TURN.set(turn)
            try:
                output = await super().generate(
                    request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **rest
                )
            finally:
                _TURN.reset(token)
            output = await reuse.end(name, turn, output)
            if not sampling_params.get("logprobs"):  # they were for us
                output = output.model_copy(update={"log_probs": None})
            return output

        async def _acquire_server(self, *args: Any, **fields: Any) -> tuple[str, Any]:
            server_id, server = await super()._acquire_server(*args, **fields)
            return server_id, _Server(server, reuse)

    copied = object.__new__(NamingClient)
    copied.__dict__.update(client.__dict__)
    return copied


_WorkerTQ: Any = undecorated(AgentLoopWorkerTQ)


class ReuseWorker(_WorkerTQ):
    """verl's worker; see the module."""

    def __init__(self, config: Any, llm_client: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, llm_client, *args, **kwargs)
        self._reuse = Reuse(reuse_settings(config), _max_chunk(config))
        self.llm_client: Any = naming_client(llm_client, self._reuse)

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **row: Any
    ) -> Any:
        name = None
        try:
            name = rollout_name(trajectory, row)
        except Exception as error:
            self._reuse.failed(error, -1)
        token = _NAME.set(name)
        try:
            return await super()._run_agent_loop(sampling_params, trajectory=trajectory, **row)
        finally:
            _NAME.reset(token)

    async def spec_rollout_repeat(self, seed: int, worker: int) -> None:
        """Plain samples are those of another run: see `RepeatableNoise`."""
        self._reuse.noise = RepeatableNoise(seed, worker)

    async def spec_rollout_counters(self) -> dict[str, int]:
        """`Reuse.counters`."""
        return dict(self._reuse.counters)


class ReuseManager(AgentLoopManagerTQ):
    """verl's manager; see the module."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        import ray
        from omegaconf import OmegaConf, open_dict

        settings = reuse_settings(config)
        if (untested := untested_version()) is not None:
            logger.warning("spec_rollout: %s", untested)
        self._save_freq = int(config.trainer.get("save_freq", -1))
        self._told_step = 1  # the first has none before it
        self._shards: list[Any] = []  # held on to: an actor goes with its maker's last handle
        if settings.drafts == "actors":
            names, self._shards = start_shards(
                f"spec_rollout_drafts_{uuid.uuid4().hex[:8]}",
                settings.num_actors,
                max_bytes=settings.max_bytes or None,
                folder=settings.folder or None,
            )
            if settings.folder:
                found = ray.get([shard.info.remote() for shard in self._shards])
                logger.info(
                    "spec_rollout: %d drafts of %d prompts found in %s",
                    sum(info["num_samples"] for info in found),
                    sum(info["num_prompts"] for info in found),
                    settings.folder,
                )
            config = config.copy()
            with open_dict(config):
                config[SECTION] = OmegaConf.create(
                    {**dict(config.get(SECTION) or {}), "shards": names}
                )
        super().__init__(config, *args, **kwargs)
        self.agent_loop_workers_class = ray.remote(ReuseWorker)
        logger.info(
            "spec_rollout: drafts kept by %s, %s",
            settings.drafts,
            settings.mode if self._shards else engine_options(config).mode,
        )

    async def _init_agent_loop_workers(self) -> None:
        await super()._init_agent_loop_workers()
        if (seed := repeated_seed(self.config)) is not None:
            for number, worker in enumerate(self.agent_loop_workers):
                await worker.spec_rollout_repeat.remote(seed, number)

    def generate_sequences(self, prompts: Any) -> Any:
        """verl's; with actors, it says before a training step what those before it gained.

        verl calls it once for a step, and again to refill a step's groups and where it goes on
        while it trains.
        """
        is_validation = "validate" in prompts and bool(prompts["validate"])
        step = int(prompts["global_steps"])
        if self._shards and not is_validation and step > self._told_step:
            self._told_step = step
            counts = self.counters()
            logger.info("spec_rollout: before step %d: %s", step, counts)
            # verl says nothing to a manager when it has written a checkpoint, or has ended.
            # Rollouts that begin meanwhile would wait behind it, and give up; an asynchronous
            # trainer has some under way, which then do.
            if self._save_freq > 0 and (step - 1) % self._save_freq == 0:
                for error in save_shards(self._shards):
                    logger.warning("spec_rollout: drafts not written: %s", error)
        return super().generate_sequences(prompts)

    def counters(self) -> dict[str, int]:
        """`Reuse.counters` of all workers together."""
        import ray

        each = ray.get([w.spec_rollout_counters.remote() for w in self.agent_loop_workers])
        return {name: sum(counts[name] for counts in each) for name in each[0]}
