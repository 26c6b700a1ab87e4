"""verl's vLLM server with our client, asked as an agent loop asks. Prints what it saw as JSON.

python verl_session.py FOLDER RAY_FOLDER
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

LENGTH = 200
CHUNK = 7  # of the engine; a draft that is followed takes its time, too
PARAMS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "logprobs": True,
}
LONG = {**PARAMS, "ignore_eos": True, "max_tokens": LENGTH}


def load_same_weights(worker: Any) -> None:
    """A weight update, as the engine sees it, with the weights that are there."""
    worker.model_runner.get_model().load_weights(())


class Session:
    """A server, and a client for each way of keeping drafts."""

    def __init__(self, manager: Any, config: Any) -> None:
        from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

        from spec_rollout.adapters.settings import ReuseSettings
        from spec_rollout.adapters.turns import Reuse
        from spec_rollout.adapters.verl import naming_client

        self.server = manager.server_handles[0]
        self.num_aborted: list[int] = []
        self._client = manager.get_client(client_cls=FullyAsyncLLMServerClient)
        self._naming_client = naming_client
        self._settings, self._reuse = ReuseSettings, Reuse

    def client(self, **settings: Any) -> tuple[Any, Any]:
        """A client that names its requests, and what it counts."""
        reuse = self._reuse(self._settings(**settings), max_chunk=CHUNK)
        return self._naming_client(self._client, reuse), reuse

    async def run_there(self, make: Any, *args: Any) -> Any:
        """Runs a coroutine of the server, `make(server, ...)`, in its loop."""

        def call(server: Any) -> Any:  # in a thread beside the loop
            loop = server._server_task.get_loop()
            return asyncio.run_coroutine_threadsafe(make(server, *args), loop).result(300)

        return await self.server.__ray_call__.remote(call)

    async def ask(self, method: str) -> dict[str, Any]:
        """What the engine's only worker answers; verl's own call gives nothing back."""

        async def ask(server: Any, method: str) -> Any:
            return await server.engine.collective_rpc(method)

        return (await self.run_there(ask, method))[0]

    async def abort_all(self) -> int:
        """Aborts all requests, as before a weight update; their number.

        verl's own `abort_all_requests` is written for an older vLLM than the one of these tests.
        """

        async def abort(server: Any) -> int:
            running = len(server.engine.output_processor.request_states)
            await server.engine.pause_generation(mode="abort", clear_cache=True)
            await server.engine.resume_generation()
            return running

        return await self.run_there(abort)

    async def history(self) -> dict[str, Any]:
        """What the engine remembers."""
        return await self.ask("spec_rollout_history")

    async def roll(
        self, client: Any, step: int, prompts: list[list[int]], **more: Any
    ) -> list[Any]:
        """A rollout of each prompt, as concurrent agent loops."""
        from spec_rollout.adapters import verl
        from spec_rollout.adapters.turns import RolloutName

        params = more.pop("params", PARAMS)
        is_validation = more.pop("is_validation", False)

        async def loop(sample: int, prompt: list[int]) -> Any:
            verl._NAME.set(RolloutName("row", sample, step, is_validation))
            return await client.generate(
                f"{step}-{sample}", prompt_ids=prompt, sampling_params=params
            )

        return await asyncio.gather(
            *(asyncio.create_task(loop(*row)) for row in enumerate(prompts))
        )

    async def roll_aborted(self, client: Any, step: int, prompts: list[list[int]]) -> list[Any]:
        """The same with all requests aborted once on their way, as before a weight update."""
        rolling = asyncio.create_task(self.roll(client, step, prompts, params=LONG))
        while await self.num_steps() < self.steps_before + 3:
            await asyncio.sleep(0.005)
        self.num_aborted.append(await self.abort_all())
        return await rolling

    async def note_steps(self) -> None:
        """`roll_aborted` waits for three more than now."""
        self.steps_before = await self.num_steps()

    async def num_steps(self) -> int:
        """Of the engine so far."""
        return (await self.ask("spec_rollout_metrics"))["num_engine_steps"]


def texts(outputs: list[Any]) -> list[list[int]]:
    return [list(output.token_ids) for output in outputs]


async def named(session: Session, prompts: list[list[int]]) -> dict[str, Any]:
    """Drafts kept by the engine."""
    client, _ = session.client()
    first = await session.roll(client, 1, prompts)
    await session.server.collective_rpc.remote(load_same_weights)
    second = await session.roll(client, 2, prompts)
    known = await session.history()
    validation = await session.roll(client, 2, prompts, is_validation=True)
    after = await session.history()
    await session.server.collective_rpc.remote(load_same_weights)
    await session.note_steps()
    aborted = await session.roll_aborted(client, 3, prompts)
    return {
        "first": texts(first),
        "second": texts(second),
        "validation": texts(validation),
        "num_with_draft": known["num_with_draft"],
        "served": [known["num_served"], after["num_served"]],
        "bytes": [known["num_bytes"], after["num_bytes"]],
        "aborted": texts(aborted),
        "aborted_logprobs": [list(output.log_probs) for output in aborted],
        "num_requests": (await session.history())["num_served"] - after["num_served"],
        "counts": [sorted(output.extra_fields) for output in first],
    }


async def pooled(session: Session, prompts: list[list[int]]) -> dict[str, Any]:
    """Drafts kept by an actor, under the lossless rule: an abort changes no token."""
    import ray

    from spec_rollout.adapters.draft_pool import start_shards

    shards, handles = start_shards("drafts_a", 1)
    client, reuse = session.client(drafts="actors", shards=tuple(shards), timeout=120.0)
    whole = await session.roll(client, 1, prompts, params=LONG)
    followed = await session.roll(client, 2, prompts, params=LONG)
    others, other_handles = start_shards("drafts_b", 2)
    other, _ = session.client(drafts="actors", shards=tuple(others), timeout=120.0)
    await session.note_steps()
    aborted = await session.roll_aborted(other, 1, prompts)
    await session.note_steps()
    aborted_drafts = await session.roll_aborted(client, 3, prompts)
    silent = await session.roll(
        client, 4, prompts, params={**LONG, "logprobs": False, "max_tokens": 5}
    )
    counters = dict(reuse.counters)
    for handle in handles:
        ray.kill(handle)
    failed = await session.roll(client, 5, prompts)
    del other_handles
    return {
        "whole": texts(whole),
        "followed": texts(followed),
        "followed_counts": [output.extra_fields for output in followed],
        "aborted": texts(aborted),
        "aborted_drafts": texts(aborted_drafts),
        "silent": [output.log_probs is None for output in silent],
        "silent_texts": texts(silent),
        "counters": counters,
        "failed": texts(failed),
        "failed_counts": [output.extra_fields for output in failed],
        "failures": reuse.counters["failures"],
    }


async def main(folder: Path) -> None:
    from byte_tokenizer import byte_tokenizer
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from verl.workers.rollout.llm_server import LLMServerManager
    from verl_runs import TEMPLATE, make_prompt, overrides

    with initialize_config_module("verl.trainer.config", version_base=None):
        rollout = "actor_rollout_ref.rollout"
        more = [f"{rollout}.nnodes=1", f"{rollout}.n_gpus_per_node=1"]
        config = compose("ppo_trainer", [*overrides(folder), *more])
    OmegaConf.resolve(config)
    tokenizer = byte_tokenizer(TEMPLATE)
    prompts = [
        tokenizer.encode(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": make_prompt(number)}],
                add_generation_prompt=True,
                tokenize=False,
            )
        )
        for number in (0, 0, 1, 2)
    ]
    manager = await LLMServerManager.create(config)
    session = Session(manager, config)
    found = {"prompts": prompts, "named": await named(session, prompts)}
    found["pooled"] = await pooled(session, prompts)
    found["num_aborted"] = session.num_aborted
    print("RESULT " + json.dumps(found, default=int))


if __name__ == "__main__":
    import ray

    logging.basicConfig(level=logging.WARNING)
    ray.init(
        num_cpus=16,
        num_gpus=1,
        object_store_memory=100_000_000,
        include_dashboard=False,
        _temp_dir=sys.argv[2],
    )
    try:
        asyncio.run(main(Path(sys.argv[1])))
    finally:
        ray.shutdown()
