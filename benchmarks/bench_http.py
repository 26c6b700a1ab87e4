"""`vllm serve` as it is and with SPEC_ROLLOUT, under a client over HTTP that knows nothing of us.

    OMP_NUM_THREADS=1 python benchmarks/bench_http.py
    python benchmarks/bench_http.py --model FOLDER --data questions.jsonl --update MOVED_FOLDER \
      --samples 1 --max-tokens 96 --temperature 0.5 --max-num-seqs 8 --name serving_http_real

Each contender is a server of its own, with vLLM's own settings but for the model's length; all
serve the same requests in turn, in an order that rotates from round to round. Every sample of every
prompt is a request of its own, and all are sent at once, three times: first pass, second pass with
the same weights, and a third one after an update of the weights (the demo's: by an epoch of its
training). Before the second and the third pass the weights are loaded anew, as a trainer does it.

| contender | SPEC_ROLLOUT |
|---|---|
| stock | off |
| drafting | drafting |
| coupled | {"mode": "coupled", "identity": "arrival"} |

Steps and tokens are vLLM's own counts, from /metrics. A line for each pass is printed as it goes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import serve_client as client
from _common import Results, Timing, parser

PASSES = ("first", "second", "updated")
CONTENDERS = {
    "stock": "off",
    "drafting": "drafting",
    "coupled": '{"mode": "coupled", "identity": "arrival"}',
}


def _demo_policies(folder: Path, quick: bool) -> list[str]:
    """Two folders with the demo's model, one epoch of its training apart."""
    from rollout_drafting import _policies
    from safetensors.torch import save_file

    from spec_rollout.demo import model_dir

    folders = []
    for i, weights in enumerate(_policies(quick)):
        shutil.copytree(model_dir(), folder / str(i))
        path = folder / str(i) / "model.safetensors"
        save_file(dict(weights), path, metadata={"format": "pt"})
        folders.append(str(folder / str(i)))
    return folders


Found = dict[tuple[str, str], list[client.Served]]


def _run(args: argparse.Namespace, logs: Path, folders: list[str], found: Found) -> int:
    """Serves all rounds; adds to `found`, by contender and pass. Returns the number of requests.

    `logs` is a folder for those of the servers.
    """
    model, prompts, arguments, params = client.workload(args)
    started = {
        name: client.Server(model, CONTENDERS[name], arguments, logs / f"{name}.log")
        for name in args.contenders
    }
    with client.servers(list(started.values())):
        for round_ in range(args.repeats):
            shift = round_ % len(started)
            names = list(started)
            for name in names[shift:] + names[:shift]:
                address = started[name].address
                if CONTENDERS[name] != "off":
                    client.call(address, "spec_rollout_history", "clear")
                for pass_ in PASSES:
                    client.load_weights(address, folders[pass_ == "updated"])
                    _, served = client.measured(address, prompts, [params] * len(prompts))
                    found.setdefault((name, pass_), []).append(served)
                    line = {"contender": name, "pass": pass_, "round": round_, **asdict(served)}
                    print(json.dumps(line), flush=True)
    return len(prompts)


def _add(results: Results, args: argparse.Namespace, found: Found, num_requests: int) -> None:
    """A row for each contender and pass."""
    for (name, pass_), all_served in found.items():
        stock = found["stock", pass_]
        # Responses differ from contender to contender, so seconds are compared per token.
        ratios = [
            (s.seconds / s.tokens) / (a.seconds / a.tokens)
            for a, s in zip(all_served, stock, strict=True)
        ]
        p20, p50, p80 = np.percentile([a.seconds for a in all_served], [20, 50, 80]).tolist()
        steps = sum(a.steps for a in all_served)
        tokens = sum(a.tokens for a in all_served)
        count = len(all_served)
        results.add(
            f"{name}, {pass_}, {num_requests}",
            timing=Timing(p20, p50, p80, count),
            shape={"batch": num_requests, "group": args.samples},
            dtype=args.dtype,
            contender=name,
            which=pass_,
            tokens_per_second_over_stock=round(float(np.median(ratios)), 4),
            engine_steps=round(steps / count, 1),
            engine_steps_over_stock=round(steps / sum(s.steps for s in stock), 4),
            computed_per_token=round(sum(a.computed for a in all_served) / tokens, 4),
            tokens=round(tokens / count, 1),
            proposed=round(sum(a.proposed for a in all_served) / count, 1),
            accepted=round(sum(a.accepted for a in all_served) / count, 1),
            max_num_seqs=args.max_num_seqs,
            temperature=args.temperature,
        )


def main() -> None:
    options = parser(__doc__)
    client.add_options(options)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    options.add_argument("--name", default="serving_http", help="of the results file")
    args = options.parse_args()
    client.check_options(options, args)
    if "stock" not in args.contenders:
        options.error("--contenders: expected stock among them, which the others are compared with")
    if args.quick:
        args.prompts, args.repeats = 4, 1
    results = Results(args.name, args.out)
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            folders = [args.model, args.update or args.model]
        else:
            folders = _demo_policies(Path(folder), args.quick)
        num_requests = _run(args, Path(folder), folders, found)
        _add(results, args, found, num_requests)
    results.write()


if __name__ == "__main__":
    main()
