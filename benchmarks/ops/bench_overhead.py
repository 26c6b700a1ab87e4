"""What a call costs apart from its work: each op on an empty batch, and the import beyond torch's
own.

The aim is below 20 microseconds per call, and below one second for the import. A call of splice_kv
also pays for every cache it is given, about a microsecond each.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import ROOT, Results, Timing, measure, parser

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient

_IMPORT = """
import time, torch
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def import_seconds(module: str, repeats: int) -> Timing:
    """Seconds of `import module` in fresh interpreters in which torch is imported already."""
    samples = []
    for _ in range(repeats + 1):  # the first one may write .pyc files
        out = subprocess.run(
            [sys.executable, "-c", _IMPORT.format(module=module)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        samples.append(float(out.stdout))
    samples = sorted(samples[1:])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(samples), fifths[3], repeats)


def main() -> None:
    args = parser(__doc__).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    # Samples of about a millisecond: shorter than what a scheduler gives to someone else in
    # between.
    repeats, calls = (3, 50) if args.quick else (301, 50)
    results = Results("ops_overhead", args.out)
    floats = torch.empty(0)
    logits = torch.empty(0, 1000)
    ids = torch.empty(0, dtype=torch.int64)
    cu = torch.zeros(1, dtype=torch.int64)
    # A model of 28 layers: what the arguments alone cost shows in the number of caches.
    caches = [torch.zeros(1, 1, 1, 8) for _ in range(56)]
    ranges = dict.fromkeys(("src_rows", "src_starts", "dst_rows", "dst_starts", "lens"), ids)
    lenient, coupled = Lenient(0.5), Coupled()
    table = {
        "token_logprobs": lambda: ops.token_logprobs(logits, ids),
        "accept_prefix": lambda: ops.accept_prefix(
            floats, floats, rule=lenient, keys=ids, cu_draft_lens=cu
        ),
        "verify_prefix": lambda: ops.verify_prefix(logits, ids, cu, rule=coupled, keys=ids),
        "sample_tokens": lambda: ops.sample_tokens(logits, keys=ids, positions=ids),
        "splice_kv, 2 caches": lambda: ops.splice_kv(caches[:2], caches[:2], **ranges),
        "splice_kv, 56 caches": lambda: ops.splice_kv(caches, caches, **ranges),
        "assemble, packed": lambda: ops.assemble(ids, cu, ids, cu, ids),
        "assemble, split": lambda: ops.assemble(
            ids, cu, ids, cu, ids, layout="split", max_prompt_len=8, max_response_len=8
        ),
        "torch.add (for scale)": lambda: torch.add(floats, floats),
    }
    for name, call in table.items():
        timing = measure(call, repeats=repeats, calls_per_repeat=calls, warmup=50)
        results.add(f"{name}, empty batch", timing=timing)
    for module in ("spec_rollout", "spec_rollout.ops"):
        results.add(
            f"import {module}", timing=import_seconds(module, repeats=3 if args.quick else 9)
        )
    results.write()


if __name__ == "__main__":
    main()
