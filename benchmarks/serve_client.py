"""A client of `vllm serve` that knows nothing of us: prompts in, responses out, over HTTP.

    python benchmarks/serve_client.py --samples 8 --prompts 64 --passes 2 -- drafting
    python benchmarks/serve_client.py --samples 8 --prompts 64 --passes 2 -- off

starts a server with SPEC_ROLLOUT set to the last argument, sends every sample of every prompt of
the demo's task as a request of its own, all at once, as often as it is told, and says after each
pass how many steps the engine took (the count of vLLM's `vllm:iteration_tokens_total`), what they
took and what was proposed. `--model` is another model's folder, with prompts of `--data`, JSONL
with a `prompt` in each row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def server(
    model: str, variable: str, arguments: Sequence[str] = (), log: Path | None = None
) -> Iterator[str]:
    """A `vllm serve` of a model with the variable set; gives its address.

    Raises:
        RuntimeError: if it ends before it answers; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = {
        **os.environ,
        "SPEC_ROLLOUT": variable,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    path = log or Path(os.devnull)
    with open(path, "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            address = f"http://127.0.0.1:{port}"
            while not _answers(address):
                if process.poll() is not None:
                    raise RuntimeError(path.read_text()[-3000:])
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address + "/health", timeout=1):
            return True
    except OSError:
        return False


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    """What the server answers, parsed; an error's text is raised as RuntimeError."""
    request = urllib.request.Request(
        address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from None
    return json.loads(text) if text else None


def metrics(address: str) -> dict[str, float]:
    """Sums of vLLM's metrics, by name without labels."""
    with urllib.request.urlopen(address + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        match = re.match(r"(vllm:\w+)(?:\{.*\})? (\S+)$", line)
        if match:
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def ask(address: str, prompts: Sequence[Any], each: Sequence[dict[str, Any]]) -> list[Any]:
    """The `choices[0]` of every completion; all requests are there at once."""
    with ThreadPoolExecutor(max(1, len(prompts))) as pool:
        jobs = [
            pool.submit(post, address, "/v1/completions", {"prompt": prompt, **params})
            for prompt, params in zip(prompts, each, strict=True)
        ]
        return [job.result()["choices"][0] for job in jobs]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("variable", help="value of SPEC_ROLLOUT")
    options.add_argument("--model", help="folder; the demo's if left out")
    options.add_argument("--data", type=Path, help="JSONL with a prompt in each row")
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--passes", type=int, default=2)
    options.add_argument("--max-tokens", type=int, default=120)
    options.add_argument("--named", action="store_true", help="requests name their sample")
    options.add_argument("--update", help="folder of weights to load before the last pass")
    options.add_argument("--log", type=Path)
    args = options.parse_args()
    if args.model:
        rows = [json.loads(line) for line in args.data.read_text().splitlines() if line.strip()]
        prompts = [row["prompt"] for row in rows[: args.prompts]]
        model = args.model
    else:
        from spec_rollout.demo import model_dir
        from spec_rollout.demo.task import training_problems

        prompts = [problem.prompt for problem in training_problems(args.prompts)]
        model = str(model_dir())
    size = args.prompts * args.samples
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(size)]
    arguments += ["--max-model-len", str(args.max_tokens + 392 if args.model else 192)]
    every = [prompt for prompt in prompts for _ in range(args.samples)]
    each: list[dict[str, Any]] = []
    for i in range(len(every)):
        params: dict[str, Any] = {"max_tokens": args.max_tokens, "temperature": 1.0}
        if args.named:
            params["vllm_xargs"] = {"spec_rollout": i % args.samples}
        each.append(params)
    with server(model, args.variable, arguments, args.log) as address:
        for number in range(args.passes):
            if number:  # what a trainer does between passes
                last = number == args.passes - 1
                where = args.update if last and args.update else model
                call = {"method": "reload_weights", "kwargs": {"weights_path": where}}
                post(address, "/collective_rpc", call)
                post(address, "/reset_prefix_cache", {})
            before, start = metrics(address), time.perf_counter()
            choices = ask(address, every, [{**params, "model": model} for params in each])
            seconds, after = time.perf_counter() - start, metrics(address)

            def grown(name: str, old: Any = before, new: Any = after) -> int:
                return int(new.get(name, 0.0) - old.get(name, 0.0))

            tokens = grown("vllm:generation_tokens_total")
            result = {
                "variable": args.variable,
                "pass": number + 1,
                "requests": len(choices),
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "engine_steps": grown("vllm:iteration_tokens_total_count"),
                "proposed": grown("vllm:spec_decode_num_draft_tokens_total"),
                "accepted": grown("vllm:spec_decode_num_accepted_tokens_total"),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
