"""Makes the demo's checkpoint: a small Llama, trained from scratch on the teacher's responses.

    python -m spec_rollout.demo.checkpoint --out DIR            # the shipped checkpoint, about 20
    minutes python -m spec_rollout.demo.checkpoint --out DIR --short    # the same path in under a
    minute, for CI

Seeded: the same machine, torch and thread count give the same weights. The shipped ones were made
on one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from spec_rollout.demo.task import (
    MAX_RESPONSE_TOKENS,
    Problem,
    Teacher,
    draw_problem,
    format_prompt,
    heldout_problems,
    reward,
    teacher_response,
)
from spec_rollout.demo.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_IGNORED = -100  # label of prompt and padding tokens


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """Everything that determines the checkpoint.

    Attributes:
        hidden_size, num_layers, num_heads, head_dim, intermediate_size: Shape of the Llama.
        num_steps: Optimizer steps.
        batch_size: Responses per step.
        lr: Peak learning rate of AdamW; linear warm-up, then cosine to a tenth.
        warmup_steps: Length of the warm-up.
        seed: Of weights and corpus.
        teacher: Error rates of the corpus.
    """

    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 256
    num_steps: int = 4000
    batch_size: int = 32
    lr: float = 3e-3
    warmup_steps: int = 100
    seed: int = 0
    teacher: Teacher = field(default_factory=Teacher)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "head_dim", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if not (0.0 < self.lr < math.inf):
            raise ValueError(f"lr: expected a positive finite number, got {self.lr}")


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model in float32; seeds torch with `config.seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8 * math.ceil(len(tokenizer) / 8),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def corpus_batches(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input_ids, labels), each [batch, length] int64, right-padded.

    Only responses have labels.
    """
    rng = random.Random(f"corpus:{config.seed}")
    while True:
        rows = []
        for _ in range(8 * config.batch_size):
            start, terms = draw_problem(rng, "pretrain")
            prompt = format_prompt(start, terms)
            rows.append((len(prompt), prompt + teacher_response(start, terms, rng, config.teacher)))
        rows.sort(key=lambda row: len(row[1]))  # similar lengths together: little padding
        encoded = tokenizer([text for _, text in rows])["input_ids"]
        starts = list(range(0, len(rows), config.batch_size))
        rng.shuffle(starts)
        for first in starts:
            chosen = range(first, first + config.batch_size)
            width = max(len(encoded[i]) for i in chosen) + 1
            ids = torch.full((config.batch_size, width), tokenizer.pad_token_id)
            labels = torch.full((config.batch_size, width), _IGNORED)
            for row, i in enumerate(chosen):
                tokens = torch.tensor([*encoded[i], tokenizer.eos_token_id])
                ids[row, : len(tokens)] = tokens
                labels[row, rows[i][0] : len(tokens)] = tokens[rows[i][0] :]
            yield ids, labels


def pretrain(
    config: PretrainConfig, *, log_every: int = 100
) -> tuple[LlamaForCausalLM, list[float]]:
    """Trains from scratch.

    Returns:
        The model, and the loss of every step in nats per response token.
    """
    tokenizer = build_tokenizer()
    model = build_model(config, tokenizer).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.98),
    )

    def lr_factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    losses: list[float] = []
    began = time.perf_counter()
    batches = corpus_batches(config, tokenizer)
    for step in range(config.num_steps):
        ids, labels = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % log_every == 0 or step + 1 == config.num_steps:
            recent = losses[-log_every:]
            print(
                f"step {step + 1}/{config.num_steps}  loss {sum(recent) / len(recent):.4f} "
                f"nats/token  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return model.eval(), losses


@torch.inference_mode()
def sampled_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Problem],
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> float:
    """Mean reward of one plain sample (temperature 1) per problem, by `model.generate`.

    Seeds torch.
    """
    torch.manual_seed(seed)
    total = 0.0
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        inputs = tokenizer(
            [r.prompt for r in batch], padding=True, padding_side="left", return_tensors="pt"
        )
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        total += sum(reward(r.prompt, text, r.answer) for r, text in zip(batch, texts, strict=True))
    return total / max(1, len(rows))


def save(model: LlamaForCausalLM, config: PretrainConfig, out: Path) -> None:
    """Writes the Hugging Face folder (config, safetensors, tokenizer) and `pretrain.json`."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    (out / "pretrain.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pre-train the demo's model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--short", action="store_true", help="a minute's worth, for CI")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    config = PretrainConfig(seed=args.seed)
    if args.short:
        config = replace(config, num_layers=2, num_steps=40, batch_size=16, warmup_steps=10)
    if args.steps is not None:
        config = replace(config, num_steps=args.steps)
    model, losses = pretrain(config, log_every=10 if args.short else 100)
    save(model, config, args.out)
    accuracy = sampled_accuracy(
        model, build_tokenizer(), heldout_problems(64 if args.short else 512)
    )
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, sampled accuracy {accuracy:.3f}, saved to "
        f"{args.out}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
