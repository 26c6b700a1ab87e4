"""A model of the size of a real one with random weights, made where there is no network.

    python benchmarks/gpu/random_model.py FOLDER --moved MOVED_FOLDER --shape 1.7b --dtype bfloat16

It takes the time of a model of that shape and says nothing. How sure it is is set: the output head
is scaled so that logits have the deviation at which as many independent normal ones have the
entropy `--entropy`, in nats per token. The moved copy is the policy after an update: noise is added
to its output head, so that logits move by `--drift` (a deviation, in nats). How much of a draft
passes then is a result, as with any model.

Tokens are the demo's in the prompts and any in the responses, which hardly ever end by themselves.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size: those
# of Qwen3, with its vocabulary; the last is for tests.
SHAPES = {
    "0.6b": (1024, 28, 16, 8, 3072, 151_936),
    "1.7b": (2048, 28, 16, 8, 6144, 151_936),
    "4b": (2560, 36, 32, 8, 9728, 151_936),
    "tiny": (128, 2, 4, 2, 256, 4_096),
}
_HEAD_SIZE = 128


def deviation(entropy: float, vocab: int) -> float:
    """Of independent normal logits whose softmax has this mean entropy, in nats."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, vocab, generator=generator, dtype=torch.float64)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        logp = (middle * logits).log_softmax(dim=-1)
        if float(-(logp.exp() * logp).sum(dim=-1).mean()) > entropy:
            low = middle
        else:
            high = middle
    return high


def make(folder: Path, moved: Path, shape: str, dtype: str, entropy: float, drift: float) -> None:
    """Writes both models, each one file of weights, and the demo's tokenizer to them."""
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from spec_rollout.demo import model_dir

    hidden, layers, heads, kv_heads, intermediate, vocab = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        head_dim=min(_HEAD_SIZE, hidden // heads),
        max_position_embeddings=32_768,
        # Tied, a random model repeats its last token.
        tie_word_embeddings=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(kind)
    weights = model.state_dict()
    logit_deviation = deviation(entropy, vocab)
    # Behind its last norm a hidden state has `hidden` entries of one, in the mean square.
    scale = logit_deviation / hidden**0.5
    head = scale * torch.randn(vocab, hidden, device=device)
    noise = drift / logit_deviation * scale * torch.randn(vocab, hidden, device=device)
    for target, values in ((folder, head), (moved, head + noise)):
        target.mkdir(parents=True, exist_ok=True)
        weights["lm_head.weight"] = values.to(kind)
        config.dtype = kind
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(target)
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        save_file(on_cpu, target / "model.safetensors", metadata={"format": "pt"})
        for file in Path(model_dir()).glob("*token*"):
            shutil.copy(file, target)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folder", type=Path)
    options.add_argument("--moved", type=Path, required=True)
    options.add_argument("--shape", choices=SHAPES, default="1.7b")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--entropy", type=float, default=0.5)
    options.add_argument("--drift", type=float, default=0.05)
    args = options.parse_args()
    make(args.folder, args.moved, args.shape, args.dtype, args.entropy, args.drift)


if __name__ == "__main__":
    sys.exit(main())
