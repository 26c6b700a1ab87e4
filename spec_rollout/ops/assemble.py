"""Prompts, accepted prefixes and continuations to the tensors of an engine or a trainer."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.checks import integer, shown
from spec_rollout.ops._faults import refuse
from spec_rollout.ops._registry import refuse_gradients, register_op
from spec_rollout.ops._status import after_launch, status_word

Layout = Literal["packed", "right", "left", "split"]
# `Layout` in csrc/include/spec_rollout/ops.h.
_LAYOUTS = {"packed": 0, "right": 1, "left": 2, "split": 3}
_PACKED = 0
_DIFFERENTIABLE = {"prefix_logprobs": 7, "continuation_logprobs": 8}


class Assembled(NamedTuple):
    """Sequences of prompt, accepted prefix and continuation.

    Shapes are [num_tokens] for layout "packed", otherwise [batch, width].

    Attributes:
        input_ids: Token ids; `pad_token_id` on padding. int64.
        attention_mask: True on tokens, False on padding; None for "packed", which has none. bool.
        position_ids: Place of each token in its row, from 0; 0 on padding. int64.
        response_mask: True on response tokens (accepted prefix and continuation). bool.
        logprobs: Log-probability of each response token, 0 elsewhere; None if none were given.
            float32.
        cu_lens: Row r is tokens cu_lens[r]:cu_lens[r + 1]; None unless "packed". [batch + 1],
            int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor | None
    cu_lens: torch.Tensor | None


def assemble(
    prompt_ids: torch.Tensor,
    cu_prompt_lens: torch.Tensor,
    prefix_ids: torch.Tensor,
    cu_prefix_lens: torch.Tensor,
    accepted_lens: torch.Tensor,
    continuation_ids: torch.Tensor | None = None,
    cu_continuation_lens: torch.Tensor | None = None,
    *,
    layout: Layout = "packed",
    prefix_logprobs: torch.Tensor | None = None,
    continuation_logprobs: torch.Tensor | None = None,
    pad_token_id: int = 0,
    max_prompt_len: int | None = None,
    max_response_len: int | None = None,
    out: Assembled | None = None,
) -> Assembled:
    """Joins prompt, accepted prefix and continuation of each row, in the layout that a consumer
    wants.

    Without continuations the result is what generation resumes from; with them it is what a trainer
    takes. Row r is

        prompt r, the first accepted_lens[r] tokens of draft r, continuation r

    | layout | shape | |
    |---|---|---|
    | "packed" | [num_tokens] | rows end to end, with `cu_lens` |
    | "right" | [batch, width] | padding after the row |
    | "left" | [batch, width] | padding before the row |
    | "split" | [batch, P + R] | prompts end at column P, responses begin there (TRL, verl) |

    P is `max_prompt_len`, or the longest prompt; R is `max_response_len`, or the longest response.
    "right" and "left" are P + R wide if both limits are given, and as wide as the longest row
    otherwise. A row beyond a limit is an error in every layout; nothing is cut.

    Args:
        prompt_ids: Prompts end to end. [num_prompt_tokens], int32 or int64.
        cu_prompt_lens: Prompt r is prompt_ids[cu[r]:cu[r + 1]]. [batch + 1], int32 or int64, from
            0, non-decreasing.
        prefix_ids: Whole drafts end to end. [num_prefix_tokens], int32 or int64.
        cu_prefix_lens: Draft r is prefix_ids[cu[r]:cu[r + 1]]. [batch + 1], int32 or int64.
        accepted_lens: How much of each draft is used. [batch], int32 or int64.
        continuation_ids: Tokens generated after the accepted prefixes, end to end.
            [num_continuation_tokens], int32 or int64.
        cu_continuation_lens: Their offsets; given exactly if `continuation_ids` is. [batch + 1],
            int32 or int64.
        layout: See above.
        prefix_logprobs: Log-probabilities of the drafts' tokens. [num_prefix_tokens], float32.
        continuation_logprobs: The same for the continuations. [num_continuation_tokens], float32.
            With continuations, both or neither are given.
        pad_token_id: Fills the padding of `input_ids`.
        max_prompt_len: Longest prompt allowed, in tokens.
        max_response_len: Longest response (accepted prefix and continuation) allowed, in tokens.
        out: Result of an earlier call with the same layout and limits, to be overwritten: most of
            the time of a large batch on CPU is what the system takes to hand out fresh memory.
            Needs a padded layout with both limits. Not for `torch.compile`.

    Returns:
        `Assembled`, newly allocated on the inputs' device, or `out`.

    Raises:
        ValueError: naming the argument, what was expected and what was given: shapes, dtypes,
            devices, offsets, rows beyond a limit, and log-probs that require a gradient (where
            torch keeps gradients: there is no derivative).

    On CUDA, "packed", and the padded layouts without both limits, read the sizes of the output back
    from the device, which synchronises. With both limits nothing is read back, and rows that do not
    fit, or offsets out of range, become padding and are reported by `check_status`.
    """
    try:
        if layout not in _LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(_LAYOUTS)}, got {shown(layout)}")
        if type(pad_token_id) is not int:
            pad_token_id = integer("pad_token_id", pad_token_id)
        if (continuation_ids is None) != (cu_continuation_lens is None):
            missing = "continuation_ids" if continuation_ids is None else "cu_continuation_lens"
            raise ValueError(f"{missing}: expected a tensor with its counterpart given, got None")
        if prefix_logprobs is None and continuation_logprobs is not None:
            raise ValueError(
                "prefix_logprobs: expected a tensor with continuation_logprobs given, got None"
            )
        if max_prompt_len is not None:
            max_prompt_len = _limit("max_prompt_len", max_prompt_len)
        if max_response_len is not None:
            max_response_len = _limit("max_response_len", max_response_len)
        if out is not None:
            if layout == "packed" or max_prompt_len is None or max_response_len is None:
                raise ValueError(
                    "out: expected None unless the layout is padded and both limits are given, "
                    f'got a result with layout="{layout}", max_prompt_len={max_prompt_len}, '
                    f"max_response_len={max_response_len}"
                )
            _check_out(
                out, (accepted_lens.numel(), max_prompt_len + max_response_len), prefix_logprobs
            )
        cu_lens: torch.Tensor | None = None
        prompt_width = -1
        if layout != "packed" and max_prompt_len is not None and max_response_len is not None:
            prompt_width, width = max_prompt_len, max_prompt_len + max_response_len
        else:
            sizes, cu_lens = _sizes(
                cu_prompt_lens,
                cu_prefix_lens,
                accepted_lens,
                cu_continuation_lens,
                prompt_ids.numel(),
                prefix_ids.numel(),
                0 if continuation_ids is None else continuation_ids.numel(),
                -1 if max_prompt_len is None else max_prompt_len,
                -1 if max_response_len is None else max_response_len,
            )
            longest_prompt, longest_response, longest_row, width = sizes
            if layout == "split":
                prompt_width = longest_prompt if max_prompt_len is None else max_prompt_len
                width = prompt_width + (
                    longest_response if max_response_len is None else max_response_len
                )
            elif layout != "packed":
                width = longest_row
        arguments = (
            prompt_ids,
            cu_prompt_lens,
            prefix_ids,
            cu_prefix_lens,
            accepted_lens,
            continuation_ids,
            cu_continuation_lens,
            prefix_logprobs,
            continuation_logprobs,
            cu_lens if layout == "packed" else None,
            _LAYOUTS[layout],
            prompt_width,
            width,
            pad_token_id,
        )
        if out is not None:
            refuse_gradients("assemble", _DIFFERENTIABLE, arguments)
            _write((out.input_ids, out.attention_mask, *out[2:5]), *arguments)
            return out
        input_ids, attention_mask, position_ids, response_mask, logprobs = _assemble(*arguments)
        return Assembled(
            input_ids,
            None if layout == "packed" else attention_mask,
            position_ids,
            response_mask,
            None if prefix_logprobs is None else logprobs,
            cu_lens if layout == "packed" else None,
        )
    except Exception as error:
        refuse(error, assemble, locals())
        raise


def _limit(name: str, value: int) -> int:
    if type(value) is not int:
        value = integer(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected >= 0, got {value}")
    return value


def _sizes(
    cu_prompt_lens,
    cu_prefix_lens,
    accepted_lens,
    cu_continuation_lens,
    num_prompt_tokens: int,
    num_prefix_tokens: int,
    num_continuation_tokens: int,
    max_prompt_len: int,
    max_response_len: int,
) -> tuple[tuple[int, int, int, int], torch.Tensor]:
    """(longest prompt, longest response, longest row, number of tokens) and cu_lens, inputs
    checked."""
    cu_lens = cu_prompt_lens.new_empty(cu_prompt_lens.shape, dtype=torch.int64)
    sizes = _C.assemble_sizes(
        cu_prompt_lens,
        cu_prefix_lens,
        accepted_lens,
        cu_continuation_lens,
        num_prompt_tokens,
        num_prefix_tokens,
        num_continuation_tokens,
        max_prompt_len,
        max_response_len,
        cu_lens,
    )
    if sizes is None:
        most = num_prompt_tokens + num_prefix_tokens + num_continuation_tokens
        sizes = _sizes_cuda(
            cu_prompt_lens,
            accepted_lens,
            cu_continuation_lens,
            most,
            max_prompt_len,
            max_response_len,
            cu_lens,
        )
    return sizes, cu_lens


def _sizes_cuda(
    cu_prompt_lens,
    accepted_lens,
    cu_continuation_lens,
    most: int,
    max_prompt_len: int,
    max_response_len: int,
    cu_lens: torch.Tensor,
) -> tuple[int, int, int, int]:
    """The same, read back from the device at once; the offsets themselves are left to the kernel to
    check."""
    cu_lens.zero_()
    if accepted_lens.numel() == 0:
        return 0, 0, 0, 0
    prompt_lens = cu_prompt_lens.diff().long()
    response_lens = accepted_lens.long()
    if cu_continuation_lens is not None:
        response_lens = response_lens + cu_continuation_lens.diff()
    lens = prompt_lens + response_lens
    torch.cumsum(lens, dim=0, out=cu_lens[1:])
    (prompt, prompt_row), (response, response_row), (row, _), (num_tokens, _) = torch.stack(
        [
            *(torch.stack([x.max(), x.argmax()]) for x in (prompt_lens, response_lens, lens)),
            cu_lens[-1:].expand(2),
        ]
    ).tolist()
    if 0 <= max_prompt_len < prompt:
        raise ValueError(
            f"max_prompt_len: expected prompts of at most {max_prompt_len} tokens, "
            f"got {prompt} in row {prompt_row}"
        )
    if 0 <= max_response_len < response:
        raise ValueError(
            f"max_response_len: expected responses of at most {max_response_len} tokens, "
            f"got {response} in row {response_row}"
        )
    # Only nonsense in the offsets makes these negative, or larger than all the tokens there are.
    prompt, response, row, num_tokens = (
        min(max(size, 0), most) for size in (prompt, response, row, num_tokens)
    )
    return prompt, response, row, num_tokens


def _outputs(prompt_ids, batch, layout, width, logprobs_given):
    packed = layout == _PACKED
    input_ids = prompt_ids.new_empty((width,) if packed else (batch, width), dtype=torch.int64)
    response_mask = torch.empty_like(input_ids, dtype=torch.bool)
    return (
        input_ids,
        response_mask.new_empty(0) if packed else torch.empty_like(response_mask),
        torch.empty_like(input_ids),
        response_mask,
        torch.empty_like(input_ids, dtype=torch.float32)
        if logprobs_given
        else input_ids.new_empty(0, dtype=torch.float32),
    )


def _assemble_fake(
    prompt_ids,
    cu_prompt_lens,
    prefix_ids,
    cu_prefix_lens,
    accepted_lens,
    continuation_ids,
    cu_continuation_lens,
    prefix_logprobs,
    continuation_logprobs,
    cu_lens,
    layout,
    prompt_width,
    width,
    pad_token_id,
):
    return _outputs(prompt_ids, accepted_lens.shape[0], layout, width, prefix_logprobs is not None)


def _assemble_direct(*arguments):
    """What a layout does not have is not allocated."""
    prompt_ids, accepted_lens, logprobs_given = arguments[0], arguments[4], arguments[7] is not None
    layout, width = arguments[10], arguments[12]
    packed = layout == _PACKED
    shape = (width,) if packed else (accepted_lens.numel(), width)
    if prompt_ids.dtype is torch.int64:  # naming the dtype costs half of an allocation
        input_ids = prompt_ids.new_empty(shape)
    else:
        input_ids = prompt_ids.new_empty(shape, dtype=torch.int64)
    response_mask = torch.empty_like(input_ids, dtype=torch.bool)
    outputs = (
        input_ids,
        None if packed else torch.empty_like(response_mask),
        torch.empty_like(input_ids),
        response_mask,
        torch.empty_like(input_ids, dtype=torch.float32) if logprobs_given else None,
    )
    _write(outputs, *arguments)
    return outputs


# An op's results are always tensors: what a layout does not have comes back as [0].
@register_op(
    "assemble(Tensor prompt_ids, Tensor cu_prompt_lens, Tensor prefix_ids, Tensor cu_prefix_lens, "
    "Tensor accepted_lens, Tensor? continuation_ids, Tensor? cu_continuation_lens, "
    "Tensor? prefix_logprobs, Tensor? continuation_logprobs, Tensor? cu_lens, int layout, "
    "SymInt prompt_width, SymInt width, int pad_token_id) -> "
    "(Tensor input_ids, Tensor attention_mask, Tensor position_ids, Tensor response_mask, "
    "Tensor logprobs)",
    fake=_assemble_fake,
    direct=_assemble_direct,
    differentiable=_DIFFERENTIABLE,
)
def _assemble(
    prompt_ids,
    cu_prompt_lens,
    prefix_ids,
    cu_prefix_lens,
    accepted_lens,
    continuation_ids,
    cu_continuation_lens,
    prefix_logprobs,
    continuation_logprobs,
    cu_lens,
    layout,
    prompt_width,
    width,
    pad_token_id,
):
    outputs = _outputs(
        prompt_ids, accepted_lens.numel(), layout, width, prefix_logprobs is not None
    )
    _write(
        outputs,
        prompt_ids,
        cu_prompt_lens,
        prefix_ids,
        cu_prefix_lens,
        accepted_lens,
        continuation_ids,
        cu_continuation_lens,
        prefix_logprobs,
        continuation_logprobs,
        cu_lens,
        layout,
        prompt_width,
        width,
        pad_token_id,
    )
    return outputs


def _check_out(
    out: Assembled, shape: tuple[int, int], prefix_logprobs: torch.Tensor | None
) -> None:
    """Names what is missing or too much in `out`; dtypes and devices are checked with the other
    arguments."""
    if out.cu_lens is not None or out.attention_mask is None:
        raise ValueError("out: expected the result of a padded layout, got a packed one")
    if (out.logprobs is None) != (prefix_logprobs is None):
        wanted = "no logprobs" if prefix_logprobs is None else "logprobs"
        raise ValueError(f"out: expected {wanted}, as in this call's arguments, got the opposite")
    for name, tensor in zip(Assembled._fields, out, strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"out: expected {name} of shape {list(shape)}, got {list(tensor.shape)}"
            )


def _write(
    outputs,
    prompt_ids,
    cu_prompt_lens,
    prefix_ids,
    cu_prefix_lens,
    accepted_lens,
    continuation_ids,
    cu_continuation_lens,
    prefix_logprobs,
    continuation_logprobs,
    cu_lens,
    layout,
    prompt_width,
    width,
    pad_token_id,
):
    """Launches on given outputs; `width` is theirs."""
    input_ids, attention_mask, position_ids, response_mask, logprobs = outputs
    _C.assemble(
        prompt_ids,
        cu_prompt_lens,
        prefix_ids,
        cu_prefix_lens,
        accepted_lens,
        continuation_ids,
        cu_continuation_lens,
        prefix_logprobs,
        continuation_logprobs,
        layout,
        prompt_width,
        pad_token_id,
        cu_lens,
        input_ids,
        position_ids,
        None if layout == _PACKED else attention_mask,
        response_mask,
        None if prefix_logprobs is None else logprobs,
        status_word(prompt_ids),
        num_threads(),
    )
    after_launch(prompt_ids)
