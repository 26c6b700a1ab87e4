"""assemble against padded torch: the contexts that generation resumes from, and the trainer's final
tensors.

Peers, all written for this benchmark:

- "gather, as published": contexts of the rows to regenerate from padded int64 tensors, by the
  sequence of operations of the published implementation: ids and positions are each gathered twice
  through index matrices and merged by `where`.
- "gather, lean": the same with one index matrix per source, positions computed, a bool mask.
- "row loop": final tensors by block copies for reused rows and a Python loop over the others, as
  published, but with the masks made from known lengths (the published code searches for the
  padding).
- "row-wise cat + pad": final tensors from the op's own packed inputs, by slices and `torch.cat` per
  row and `pad_sequence`.

Each makes what the op makes and is checked against it. Building the padded inputs is not timed. The
op builds the contexts of all rows, reused ones included. "into out" rows overwrite the final
tensors of the step before, as a training loop can; the peers allocate theirs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import Results, measure, parser, peak_extra_bytes
from _workload import (
    MEAN_LEN,
    PADDED_LEN,
    PROMPT_WIDTH,
    Workload,
    long_tailed_lens,
    make_workload,
    pad,
)

from spec_rollout import ops
from spec_rollout.acceptance import Lenient
from spec_rollout.packed import cu_lens_from

PAD = 151_643


@dataclass
class Step:
    """A batch after verification and generation: packed for the op, padded for the peer."""

    work: Workload
    accepted_lens: torch.Tensor
    continuation_ids: torch.Tensor
    continuation_logprobs: torch.Tensor
    continuation_lens: torch.Tensor

    def __post_init__(self) -> None:
        work = self.work
        prompt_lens = work.cu_prompt_lens.diff()
        self.cu_continuation_lens = cu_lens_from(self.continuation_lens)
        self.need = (self.accepted_lens < work.draft_lens).nonzero().squeeze(1)
        self.reuse = (self.accepted_lens == work.draft_lens).nonzero().squeeze(1)
        # Left-padded prompts; right-padded drafts and (of the rows to regenerate) continuations.
        right = pad(work.prompt_ids.long(), prompt_lens, PROMPT_WIDTH, PAD)
        shift = (torch.arange(PROMPT_WIDTH)[None, :] + prompt_lens[:, None]) % PROMPT_WIDTH
        self.prompts = right.gather(1, shift)
        self.prompt_mask = (
            torch.arange(PROMPT_WIDTH)[None, :] >= PROMPT_WIDTH - prompt_lens[:, None]
        )
        self.prompt_positions = (self.prompt_mask.long().cumsum(1) - 1).clamp_(min=0)
        self.drafts = pad(work.draft_ids.long(), work.draft_lens, PADDED_LEN, PAD)
        self.draft_logprobs = pad(work.target_logprobs, work.draft_lens, PADDED_LEN)
        self.new = pad(self.continuation_ids.long(), self.continuation_lens, PADDED_LEN, PAD)[
            self.need
        ]
        self.new_logprobs = pad(self.continuation_logprobs, self.continuation_lens, PADDED_LEN)[
            self.need
        ]

    def prefix_args(self) -> dict[str, torch.Tensor]:
        work = self.work
        return {
            "prompt_ids": work.prompt_ids,
            "cu_prompt_lens": work.cu_prompt_lens,
            "prefix_ids": work.draft_ids,
            "cu_prefix_lens": work.cu_draft_lens,
            "accepted_lens": self.accepted_lens,
        }

    def contexts(self, layout: str = "packed") -> ops.Assembled:
        return ops.assemble(**self.prefix_args(), layout=layout, pad_token_id=PAD)

    def final(self, out: ops.Assembled | None = None) -> ops.Assembled:
        return ops.assemble(
            **self.prefix_args(),
            continuation_ids=self.continuation_ids,
            cu_continuation_lens=self.cu_continuation_lens,
            prefix_logprobs=self.work.target_logprobs,
            continuation_logprobs=self.continuation_logprobs,
            layout="split",
            pad_token_id=PAD,
            max_prompt_len=PROMPT_WIDTH,
            max_response_len=PADDED_LEN,
            out=out,
        )


def make_step(batch: int) -> Step:
    work = make_workload(batch)
    accepted = ops.accept_prefix(
        work.draft_logprobs,
        work.target_logprobs,
        rule=Lenient(0.0),
        keys=work.keys,
        cu_draft_lens=work.cu_draft_lens,
    )
    lens = long_tailed_lens(batch, MEAN_LEN, PADDED_LEN, work.generator) // 2
    lens = torch.where(accepted < work.draft_lens, lens.clamp(min=1), 0)
    lens = torch.minimum(lens, PADDED_LEN - accepted)
    num_tokens = int(lens.sum())
    ids = torch.randint(0, 150_000, (num_tokens,), generator=work.generator, dtype=torch.int32)
    logprobs = -torch.rand(num_tokens, generator=work.generator)
    return Step(work, accepted, ids, logprobs, lens)


def lean_contexts(step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded ids, mask and positions of the rows to regenerate."""
    rows = step.need
    prompts, drafts = step.prompts[rows], step.drafts[rows]
    prompt_lens = step.prompt_mask[rows].sum(dim=1, keepdim=True)
    kept = step.accepted_lens[rows].long()[:, None]
    width = PROMPT_WIDTH + int(kept.max())
    column = torch.arange(width)[None, :]
    first = width - prompt_lens - kept
    in_prompt = (column >= first) & (column < first + prompt_lens)
    in_prefix = column >= first + prompt_lens
    prompt_column = (column - first + PROMPT_WIDTH - prompt_lens).clamp(0, PROMPT_WIDTH - 1)
    prefix_column = (column - first - prompt_lens).clamp(0, PADDED_LEN - 1)
    ids = torch.full((len(rows), width), PAD)
    ids = torch.where(in_prompt, prompts.gather(1, prompt_column), ids)
    ids = torch.where(in_prefix, drafts.gather(1, prefix_column), ids)
    positions = (column - first).clamp(min=0)
    return ids, in_prompt | in_prefix, positions


def published_contexts(step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, operation for operation as in the published implementation."""
    rows = step.need
    prompts, positions = step.prompts[rows], step.prompt_positions[rows]
    mask, drafts = step.prompt_mask[rows].long(), step.drafts[rows]
    kept = step.accepted_lens[rows].long()
    longest = int(kept.max())
    width = PROMPT_WIDTH + longest
    prompt_lens = mask.sum(dim=1)[:, None]
    kept = kept[:, None]
    column = torch.arange(width)[None, :]
    first = width - (prompt_lens + kept)
    in_prompt = (column >= first) & (column < first + prompt_lens)
    prompt_column = ((PROMPT_WIDTH - prompt_lens) + (column - first)).clamp(0, PROMPT_WIDTH - 1)
    in_prefix = (column >= first + prompt_lens) & (column < first + prompt_lens + kept)
    prefix_column = (column - (first + prompt_lens)).clamp(0, longest - 1)
    ids = torch.full((len(rows), width), PAD)
    ids = torch.where(in_prompt, prompts.gather(1, prompt_column), ids)
    ids = torch.where(in_prefix, drafts[:, :longest].gather(1, prefix_column), ids)
    context_mask = (in_prompt | in_prefix).long()
    context_positions = torch.zeros(len(rows), width, dtype=torch.int64)
    context_positions = torch.where(
        in_prompt, positions.gather(1, prompt_column), context_positions
    )
    table = positions[:, -1:] + torch.arange(1, longest + 1)[None, :]
    context_positions = torch.where(in_prefix, table.gather(1, prefix_column), context_positions)
    return ids, context_mask, context_positions


def looped_final(step: Step) -> tuple[torch.Tensor, ...]:
    """[batch, P + R] tensors: block copies for reused rows, a loop over the others."""
    batch = step.work.batch
    ids = torch.full((batch, PROMPT_WIDTH + PADDED_LEN), PAD)
    logprobs = torch.zeros(batch, PROMPT_WIDTH + PADDED_LEN)
    ids[:, :PROMPT_WIDTH] = step.prompts
    responses, response_logprobs = ids[:, PROMPT_WIDTH:], logprobs[:, PROMPT_WIDTH:]
    responses[step.reuse] = step.drafts[step.reuse]
    response_logprobs[step.reuse] = step.draft_logprobs[step.reuse]
    for j, i in enumerate(step.need.tolist()):
        kept = int(step.accepted_lens[i])
        responses[i, :kept] = step.drafts[i, :kept]
        responses[i, kept:] = step.new[j, : PADDED_LEN - kept]
        response_logprobs[i, :kept] = step.draft_logprobs[i, :kept]
        response_logprobs[i, kept:] = step.new_logprobs[j, : PADDED_LEN - kept]
    lens = step.accepted_lens + step.continuation_lens
    response_mask = torch.zeros(batch, PROMPT_WIDTH + PADDED_LEN, dtype=torch.bool)
    response_mask[:, PROMPT_WIDTH:] = torch.arange(PADDED_LEN)[None, :] < lens[:, None]
    attention_mask = response_mask.clone()
    attention_mask[:, :PROMPT_WIDTH] = step.prompt_mask
    positions = torch.zeros(batch, PROMPT_WIDTH + PADDED_LEN, dtype=torch.int64)
    positions[:, :PROMPT_WIDTH] = step.prompt_positions
    last = step.prompt_positions[:, -1:]
    positions[:, PROMPT_WIDTH:] = last + torch.arange(1, PADDED_LEN + 1)
    positions[:, PROMPT_WIDTH:] *= response_mask[:, PROMPT_WIDTH:]
    return ids, attention_mask, positions, response_mask, logprobs


def row_wise_final(step: Step) -> tuple[torch.Tensor, ...]:
    """The same from the packed arrays: slices and `cat` per row, prompts flipped to be padded on
    their left."""
    work = step.work
    cu_p, cu_d = work.cu_prompt_lens.tolist(), work.cu_draft_lens.tolist()
    cu_c, accepted = step.cu_continuation_lens.tolist(), step.accepted_lens.tolist()
    prompts, responses, logprobs = (
        [torch.empty(PROMPT_WIDTH)],
        [torch.empty(PADDED_LEN)],
        [torch.empty(PADDED_LEN)],
    )
    for i in range(work.batch):
        prefix = slice(cu_d[i], cu_d[i] + accepted[i])
        continuation = slice(cu_c[i], cu_c[i + 1])
        prompts.append(work.prompt_ids[cu_p[i] : cu_p[i + 1]].flip(0))
        responses.append(torch.cat([work.draft_ids[prefix], step.continuation_ids[continuation]]))
        logprobs.append(
            torch.cat([work.target_logprobs[prefix], step.continuation_logprobs[continuation]])
        )
    prompt = pad_sequence(prompts, batch_first=True, padding_value=PAD)[1:].flip(1)
    response = pad_sequence(responses, batch_first=True, padding_value=PAD)[1:]
    logprob = pad_sequence(logprobs, batch_first=True)[1:]
    ids = torch.cat([prompt, response], dim=1).long()
    lens = (step.accepted_lens + step.continuation_lens)[:, None]
    prompt_lens = work.cu_prompt_lens.diff()[:, None]
    column = torch.arange(PROMPT_WIDTH + PADDED_LEN)[None, :]
    response_mask = (column >= PROMPT_WIDTH) & (column < PROMPT_WIDTH + lens)
    attention_mask = response_mask | (
        (column < PROMPT_WIDTH) & (column >= PROMPT_WIDTH - prompt_lens)
    )
    positions = (attention_mask.long().cumsum(1) - 1) * attention_mask
    return (
        ids,
        attention_mask,
        positions,
        response_mask,
        torch.cat([torch.zeros(work.batch, PROMPT_WIDTH), logprob], 1),
    )


def check(step: Step) -> None:
    """All contenders agree, cell for cell."""
    final = step.final()
    expected = (
        final.input_ids,
        final.attention_mask,
        final.position_ids,
        final.response_mask,
        final.logprobs,
    )
    for peer in (looped_final, row_wise_final):
        for name, got, want in zip(ops.Assembled._fields, peer(step), expected, strict=False):
            assert torch.equal(got, want), (peer.__name__, name)
    left = step.contexts("left")
    assert left.attention_mask is not None
    own_mask = left.attention_mask[step.need]
    for peer in (lean_contexts, published_contexts):
        ids, mask, positions = peer(step)
        assert torch.equal(ids[mask.bool()], left.input_ids[step.need][own_mask])
        assert torch.equal(positions[mask.bool()], left.position_ids[step.need][own_mask])
    packed = step.contexts()
    assert torch.equal(packed.input_ids, left.input_ids[left.attention_mask])


def num_bytes(result: ops.Assembled) -> int:
    return sum(t.nbytes for t in result if t is not None)


def main() -> None:
    args = parser(__doc__).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    batch = 256 if args.quick else 8192
    repeats = 3 if args.quick else 9
    results = Results("ops_assemble", args.out)
    check(make_step(256))
    step = make_step(batch)
    prompt_tokens, accepted = int(step.work.cu_prompt_lens[-1]), int(step.accepted_lens.sum())
    read_contexts = 4 * (prompt_tokens + accepted)
    read_final = read_contexts + 4 * accepted + 8 * len(step.continuation_ids)

    def add(name: str, function, read: int, peers) -> None:
        output = function()
        written = (
            sum(map(num_bytes, output))
            if isinstance(output[0], ops.Assembled)
            else num_bytes(output)
        )
        del output
        results.add(
            name,
            shape={"batch": batch, "accepted tokens": accepted},
            dtype="int32 to int64",
            timing=measure(function, repeats=repeats),
            bytes_moved=read + written,
            peak_extra=peak_extra_bytes(function),
            peers={peer: measure(call, repeats=3, warmup=1) for peer, call in peers.items()},
            output_bytes=written,
        )

    contexts = {
        "gather, as published": lambda: published_contexts(step),
        "gather, lean": lambda: lean_contexts(step),
    }
    add("assemble, contexts, packed", step.contexts, read_contexts, contexts)
    add("assemble, contexts, left-padded", lambda: step.contexts("left"), read_contexts, contexts)
    final = {
        "row loop": lambda: looped_final(step),
        "row-wise cat + pad": lambda: row_wise_final(step),
    }
    add("assemble, final, split", step.final, read_final, final)
    add(
        "assemble, contexts and final",
        lambda: (step.contexts(), step.final()),
        read_contexts + read_final,
        {
            "gather, as published + row loop": lambda: (
                published_contexts(step),
                looped_final(step),
            ),
            "gather, lean + row loop": lambda: (lean_contexts(step), looped_final(step)),
        },
    )
    # As a training loop runs it: the tensors of the last step are overwritten.
    out = step.final()
    add(
        "assemble, final, split, into out",
        lambda: step.final(out),
        read_final,
        {"row loop": lambda: looped_final(step)},
    )
    add(
        "assemble, contexts and final, into out",
        lambda: (step.contexts(), step.final(out)),
        read_contexts + read_final,
        {
            "gather, as published + row loop": lambda: (
                published_contexts(step),
                looped_final(step),
            ),
            "gather, lean + row loop": lambda: (lean_contexts(step), looped_final(step)),
        },
    )
    results.write()


if __name__ == "__main__":
    main()
