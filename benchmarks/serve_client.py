"""A client of `vllm serve` that knows nothing of us: prompts in, responses out, over HTTP.

    python benchmarks/serve_client.py --samples 8 --prompts 64 --passes 2 drafting
    python benchmarks/serve_client.py --samples 8 --prompts 64 --passes 2 off
    python benchmarks/serve_client.py --model FOLDER --data questions.jsonl --temperature 0.5 off

starts a server with SPEC_ROLLOUT set to the last argument, sends every sample of every prompt of
the demo's task as a request of its own, all at once, as often as it is told, and says after each
pass how many steps the engine took (the count of vLLM's `vllm:iteration_tokens_total`), what they
took and what was proposed. `--model` is another model's folder, with prompts of `--data`: JSONL
with a `prompt` in each row, or a `question`, which goes into the model's chat template. Between
passes the weights are loaded anew, as a trainer does it.

`bench_http.py` measures several servers side by side with it.
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
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Tokens of the longest prompt, by far.
_DEMO_PROMPT, _OTHER_PROMPT = 64, 512
# The server's flag that `ask(together=True)` needs.
COUNT_REQUESTS = "--enable-server-load-tracking"


class Server:
    """A `vllm serve` in processes of its own, with the variable set. Starts when it is made.

    Args:
        model: Folder.
        variable: Value of SPEC_ROLLOUT.
        arguments: Further flags of `vllm serve`.
        log: File for what it writes; nowhere if left out.
        environment: Variables beside those of this process.

    Attributes:
        address: To send requests to, once `wait` has returned.
    """

    def __init__(
        self,
        model: str,
        variable: str,
        arguments: Sequence[str] = (),
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
        variables = {
            **os.environ,
            "SPEC_ROLLOUT": variable,
            "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc and /reset_prefix_cache
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            **(environment or {}),
        }
        variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self._log = log or Path(os.devnull)
        with open(self._log, "wb") as out:
            self._process = subprocess.Popen(command, env=variables, stdout=out, stderr=out)

    def wait(self, seconds: float = 600.0) -> None:
        """Until it answers.

        Args:
            seconds: Most of them that it may take.

        Raises:
            RuntimeError: if it ends before that, or takes longer; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while not _answers(self.address):
            late = time.monotonic() > deadline
            if late or self._process.poll() is not None:
                why = f"no answer in {seconds:g} s" if late else "it ended"
                text = self._log.read_text(errors="replace")
                raise RuntimeError(f"vllm serve: {why}\n{text[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends it; its other processes end with it."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def servers(started: Sequence[Server]) -> Iterator[None]:
    """Waits until all answer; ends them afterwards.

    Raises:
        RuntimeError: as `Server.wait`.
    """
    try:
        for one in started:
            one.wait()
        yield
    finally:
        for one in started:
            one.stop()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address + "/health", timeout=1):
            return True
    except OSError:
        return False


def post(address: str, path: str, body: Mapping[str, Any]) -> Any:
    """What the server answers, parsed; an error's text is raised as RuntimeError."""
    request = urllib.request.Request(
        address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=3600) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from None
    return json.loads(text) if text else None


def call(address: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """What a method of the server's only worker returns, by vLLM's own way to call them."""
    body = {"method": method, "args": args, "kwargs": kwargs}
    answer = post(address, "/collective_rpc", body)
    return answer["results"][0] if answer else None


def load_weights(address: str, folder: str) -> None:
    """What a trainer does between two rollouts: new weights, read from a checkpoint's folder."""
    call(address, "reload_weights", weights_path=folder)
    post(address, "/reset_prefix_cache", {})


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


def ask(
    address: str,
    prompts: Sequence[Any],
    each: Sequence[Mapping[str, Any]],
    *,
    together: bool = False,
) -> list[dict[str, Any]]:
    """The first choice of every completion; each is a request of its own, all are sent at once.

    Args:
        address: Of the server.
        prompts: Texts, or lists of token ids.
        each: Parameters of each request.
        together: The engine waits until the last one has come (`COUNT_REQUESTS`), so that its steps
            do not depend on how fast the client is.

    Raises:
        RuntimeError: with the server's words, if it does not answer one of them with 200.
    """
    with ThreadPoolExecutor(max(1, len(prompts))) as pool:
        if together:
            post(address, "/pause?mode=keep", {})
        try:
            jobs = [
                pool.submit(post, address, "/v1/completions", {"prompt": prompt, **params})
                for prompt, params in zip(prompts, each, strict=True)
            ]
            while together and _num_requests(address) < len(prompts):
                if failed := [job for job in jobs if job.done() and job.exception()]:
                    failed[0].result()
                time.sleep(0.1)
        finally:
            if together:
                post(address, "/resume", {})
        return [job.result()["choices"][0] for job in jobs]


def _num_requests(address: str) -> int:
    """Requests that the server has and has not answered."""
    with urllib.request.urlopen(address + "/load", timeout=30) as answer:
        return json.loads(answer.read())["server_load"]


@dataclass(frozen=True, slots=True)
class Served:
    """What a server did between two looks at its metrics.

    Attributes:
        tokens: Given out.
        computed: Tokens that the model computed, prompts among them, in `steps` steps.
        proposed, accepted: Of vLLM's speculative decoding.
        seconds: From the first request to the last response.
    """

    requests: int
    tokens: int
    steps: int
    computed: int
    proposed: int
    accepted: int
    seconds: float


def measured(
    address: str,
    prompts: Sequence[Any],
    each: Sequence[Mapping[str, Any]],
    *,
    together: bool = False,
) -> tuple[list[dict[str, Any]], Served]:
    """`ask`, and what that took."""
    before, start = metrics(address), time.perf_counter()
    choices = ask(address, prompts, each, together=together)
    seconds, after = time.perf_counter() - start, metrics(address)

    def grown(name: str) -> int:
        return int(after.get(f"vllm:{name}", 0.0) - before.get(f"vllm:{name}", 0.0))

    tokens = grown("generation_tokens_total")
    proposed = grown("spec_decode_num_draft_tokens_total")
    accepted = grown("spec_decode_num_accepted_tokens_total")
    return choices, Served(
        requests=len(choices),
        tokens=tokens,
        steps=grown("iteration_tokens_total_count"),
        # vLLM counts tokens of prompts and those given out. What was rejected was computed, too.
        computed=grown("iteration_tokens_total_sum") + proposed - accepted,
        proposed=proposed,
        accepted=accepted,
        seconds=round(seconds, 3),
    )


def prompts_of(data: Path, model: str, count: int) -> list[str]:
    """The first prompts of a JSONL file; questions are put into the model's chat template.

    Raises:
        ValueError: naming the row that has neither.
    """
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines[:count]]
    for number, row in enumerate(rows):
        if "prompt" not in row and "question" not in row:
            raise ValueError(
                f"{data.name}, row {number}: expected a prompt or a question, got {list(row)}"
            )
    if all("prompt" in row for row in rows):
        return [row["prompt"] for row in rows]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def in_template(question: str) -> str:
        turns = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    return [row.get("prompt") or in_template(row["question"]) for row in rows]


def workload(args: argparse.Namespace) -> tuple[str, list[str], list[str], dict[str, Any]]:
    """Of `add_options`: the model's folder, a prompt for each request, the server's arguments and
    the parameters of all requests."""
    if args.model:
        model, longest = args.model, _OTHER_PROMPT
        prompts = prompts_of(args.data, model, args.prompts)
    else:
        from spec_rollout.demo import model_dir
        from spec_rollout.demo.task import training_problems

        model, longest = str(model_dir()), _DEMO_PROMPT
        prompts = [problem.prompt for problem in training_problems(args.prompts)]
    arguments = ["--dtype", args.dtype, "--enforce-eager"]
    arguments += ["--max-model-len", str(args.max_tokens + longest)]
    if args.max_num_seqs:
        arguments += ["--max-num-seqs", str(args.max_num_seqs)]
    params = {"model": model, "max_tokens": args.max_tokens, "temperature": args.temperature}
    every = [prompt for prompt in prompts for _ in range(args.samples)]
    return model, every, arguments, params


def add_options(options: argparse.ArgumentParser) -> None:
    """What is asked of which model."""
    options.add_argument("--model", help="folder; the demo's if left out")
    options.add_argument("--data", type=Path, help="JSONL with a prompt or a question in each row")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--max-tokens", type=int, default=200)
    options.add_argument("--temperature", type=float, default=1.0)
    options.add_argument("--max-num-seqs", type=int, help="vLLM's choice if left out")
    options.add_argument("--update", help="folder of weights to load before the last pass")


def check_options(options: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where those of `add_options` do not fit together."""
    if bool(args.model) != bool(args.data):
        options.error("--model, --data: expected both or none")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("variable", help="value of SPEC_ROLLOUT")
    add_options(options)
    options.add_argument("--passes", type=int, default=2)
    options.add_argument("--named", action="store_true", help="requests name their sample")
    options.add_argument("--log", type=Path, help="of the server")
    args = options.parse_args()
    check_options(options, args)
    model, prompts, arguments, params = workload(args)
    each = [
        {**params, "vllm_xargs": {"spec_rollout": i % args.samples}} if args.named else params
        for i in range(len(prompts))
    ]
    server = Server(model, args.variable, arguments, args.log)
    with servers([server]):
        for number in range(args.passes):
            if number:
                is_last = number == args.passes - 1
                load_weights(server.address, args.update if is_last and args.update else model)
            _, served = measured(server.address, prompts, each)
            result = {"variable": args.variable, "pass": number + 1, **asdict(served)}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
