"""OpenRLHF's own rollout side on a CPU: its engine actors and its `SamplesGenerator`, two epochs.

`openrlhf_rollouts.py FOLDER RAY_FOLDER` writes what it saw to FOLDER/result.json.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUM_PROMPTS = 4
GROUP = 4


def load_same_weights(worker: Any) -> None:
    """An update, as an engine sees it: OpenRLHF's own needs CUDA. Its extension calls this, too."""
    worker.model_runner.model.load_weights(weights=())


def call_engine(actor: Any, method: Any) -> Any:
    """`AsyncLLM.collective_rpc` in the actor, whose loop runs in another thread than calls."""

    def call(self: Any) -> Any:
        loop = self.llm.output_handler.get_loop()
        return asyncio.run_coroutine_threadsafe(self.llm.collective_rpc(method), loop).result(300)

    import ray

    return ray.get(actor.__ray_call__.remote(call))[0]


def main(folder: Path) -> None:
    import ray
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
    from openrlhf.trainer.ray.vllm_engine import create_vllm_engines
    from transformers import AutoTokenizer

    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems

    engines = create_vllm_engines(
        num_engines=1, tensor_parallel_size=1, pretrain=str(model_dir()), seed=1,
        full_determinism=False, enable_prefix_caching=True, enforce_eager=True, max_model_len=256,
        gpu_memory_utilization=0.2, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    problems = training_problems(NUM_PROMPTS)
    # As its dataloader gives them: data source, prompts, labels, images.
    batches = [([""], [p.prompt], [p.answer], [None]) for p in problems]
    args = SimpleNamespace(
        rollout=SimpleNamespace(batch_size=NUM_PROMPTS, n_samples_per_prompt=GROUP),
        vllm=SimpleNamespace(enable_sleep=False),
        algo=SimpleNamespace(
            dynamic_filtering_enable=False,
            dynamic_filtering_range=None,
            advantage=SimpleNamespace(is_correction_level="token"),
        ),
    )
    generator = SamplesGenerator(
        SimpleNamespace(args=args), batches, [], AutoTokenizer.from_pretrained(model_dir()), engines
    )
    epochs = []
    for epoch in range(2):
        if epoch:
            call_engine(engines[0], load_same_weights)
        samples: list[Any] = []
        while not samples:  # the end of the data is an empty call of its own
            samples, _, _, _ = generator.generate_samples(
                temperature=1.0, top_p=1.0, max_len=256, max_new_tokens=120
            )
        found: dict[str, list[list[int]]] = {}
        for sample in samples:
            found.setdefault(sample.prompts[0], []).append(sample.sequences[0].tolist())
        epochs.append(
            {
                "responses": {prompt: sorted(rows) for prompt, rows in sorted(found.items())},
                "num_logprobs": sum(s.rollout_log_probs.numel() for s in samples),
                "num_actions": sum(s.action_mask.numel() for s in samples),
                "history": call_engine(engines[0], "spec_rollout_history"),
                "metrics": call_engine(engines[0], "spec_rollout_metrics"),
            }
        )
    ray.kill(engines[0])
    (folder / "result.json").write_text(json.dumps(epochs, default=int))


if __name__ == "__main__":
    import ray

    ray.init(
        num_cpus=4, num_gpus=1, object_store_memory=100_000_000, include_dashboard=False,
        _temp_dir=sys.argv[2],
    )  # fmt: skip
    try:
        main(Path(sys.argv[1]))
    finally:
        ray.shutdown()
