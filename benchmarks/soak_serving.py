"""An engine with a bounded history, under requests for far more prompts than it can remember.

    OMP_NUM_THREADS=1 python benchmarks/soak_serving.py

200,000 requests over 5,000 prompts, drawn by Zipf's law as users' prompts are, go through a real
vLLM on the demo's model. After every tenth of them: memory of the process, bytes and prompts
remembered, prompts forgotten, and what a step took per token. Written to results/soak_serving.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import gc
import json
import time
from pathlib import Path

import numpy as np
from _common import Results, Timing, parser


def _resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=200_000)
    options.add_argument("--prompts", type=int, default=5_000)
    options.add_argument("--history-bytes", type=int, default=4 << 20)
    options.add_argument("--max-tokens", type=int, default=12)
    args = options.parse_args()
    if args.quick:
        args.requests, args.prompts = 4_000, 500
    variable = {"mode": "drafting", "history_bytes": args.history_bytes, "log_seconds": 0}
    os.environ["SPEC_ROLLOUT"] = json.dumps(variable)
    from vllm import LLM, SamplingParams

    from spec_rollout.demo import model_dir

    rng = np.random.default_rng(0)
    vocab = json.loads((model_dir() / "config.json").read_text())["vocab_size"]
    prompts = [rng.integers(3, vocab, rng.integers(4, 24)).tolist() for _ in range(args.prompts)]
    shares = 1.0 / np.arange(1, args.prompts + 1)
    results = Results("soak_serving", args.out)
    llm = LLM(
        str(model_dir()),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        block_size=32,
        num_gpu_blocks_override=1024,
        seed=0,
    )
    params = SamplingParams(temperature=0.5, max_tokens=args.max_tokens, detokenize=False)
    size = args.requests // 40
    for part in range(10):
        seconds: list[float] = []
        tokens = 0
        for _ in range(4):
            asked = rng.choice(args.prompts, size, p=shares / shares.sum())
            start = time.perf_counter()
            outputs = llm.generate(
                [{"prompt_token_ids": prompts[i]} for i in asked], params, use_tqdm=False
            )
            seconds.append(time.perf_counter() - start)
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            del outputs
        gc.collect()
        info = llm.collective_rpc("spec_rollout_history")[0]
        counters = llm.collective_rpc("spec_rollout_metrics", args=(True,))[0]
        p20, p50, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
        results.add(
            f"requests {part * 4 * size:,} to {(part + 1) * 4 * size:,}",
            timing=Timing(p20, p50, p80, len(seconds)),
            shape={"requests": size, "prompts": args.prompts},
            microseconds_per_token=round(1e6 * sum(seconds) / tokens, 2),
            resident_mib=round(_resident_bytes() / 2**20, 1),
            accepted_share=round(
                counters["num_accepted_proposals"] / max(1, counters["num_proposed_tokens"]), 3
            ),
            **{
                name: info[name]
                for name in (
                    "history_bytes",
                    "table_bytes",
                    "num_groups",
                    "num_sequences",
                    "num_evicted_groups",
                    "num_served",
                    "num_live",
                )
            },
        )
    results.write()


if __name__ == "__main__":
    main()
