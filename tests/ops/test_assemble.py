"""assemble against its reference and hand-computed cases, in every layout."""

from __future__ import annotations

import pytest
import torch
from opchecks import opcheck

from spec_rollout import ops
from spec_rollout.ops.reference.assemble import assemble as reference
from spec_rollout.packed import cu_lens_from

LAYOUTS = ["packed", "right", "left", "split"]


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_case(
    batch: int,
    generator: torch.Generator,
    *,
    continuations: bool,
    logprobs: bool,
    longest: int = 9,
    dtype: torch.dtype = torch.int64,
) -> dict[str, torch.Tensor]:
    """Arguments of a random batch; prompts, drafts, accepted prefixes and continuations may all be
    empty."""

    def lens() -> torch.Tensor:
        return torch.randint(0, longest + 1, (batch,), generator=generator)

    def ids(count: torch.Tensor) -> torch.Tensor:
        # Beyond 32 bits where the dtype holds it; negative ones show a wrong widening.
        high = 2**31 - 1 if dtype is torch.int32 else 2**40
        return torch.randint(-high, high, (int(count.sum()),), generator=generator).to(dtype)

    prompt_lens, draft_lens, continuation_lens = lens(), lens(), lens()
    fraction = torch.rand(batch, generator=generator)
    case = {
        "prompt_ids": ids(prompt_lens),
        "cu_prompt_lens": cu_lens_from(prompt_lens).to(dtype),
        "prefix_ids": ids(draft_lens),
        "cu_prefix_lens": cu_lens_from(draft_lens).to(dtype),
        "accepted_lens": (fraction * (draft_lens + 1)).to(dtype),
    }
    if continuations:
        case["continuation_ids"] = ids(continuation_lens)
        case["cu_continuation_lens"] = cu_lens_from(continuation_lens).to(dtype)
    if logprobs:
        case["prefix_logprobs"] = -torch.rand(int(draft_lens.sum()), generator=generator)
    if logprobs and continuations:
        case["continuation_logprobs"] = -torch.rand(
            int(continuation_lens.sum()), generator=generator
        )
    return case


def assert_same(got: ops.Assembled, expected: dict[str, torch.Tensor | None]) -> None:
    assert set(got._fields) == set(expected)
    for name, want in expected.items():
        value = getattr(got, name)
        if want is None:
            assert value is None, name
            continue
        assert value.dtype == want.dtype, name
        assert value.shape == want.shape, name
        assert torch.equal(value.cpu(), want.cpu()), name


def on(device: str, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in case.items()}


# 40: rows longer than the vectors of the copies; batch 1 and 0: no neighbours, no rows.
@pytest.mark.parametrize(("batch", "longest"), [(0, 9), (1, 9), (7, 3), (50, 9), (20, 40)])
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("continuations", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_reference(
    device, layout, continuations, logprobs, batch, longest, generator
) -> None:
    for dtype in (torch.int32, torch.int64):
        case = random_case(
            batch,
            generator,
            continuations=continuations,
            logprobs=logprobs,
            longest=longest,
            dtype=dtype,
        )
        for limits in (
            {},
            {"max_prompt_len": longest + 2},
            {"max_response_len": 2 * longest},
            {"max_prompt_len": longest, "max_response_len": 2 * longest + 3},
        ):
            args = {"layout": layout, "pad_token_id": -7, **limits}
            assert_same(ops.assemble(**on(device, case), **args), reference(**case, **args))


HAND = {
    "prompt_ids": tensor(1, 2, 3),
    "cu_prompt_lens": tensor(0, 1, 3),
    "prefix_ids": tensor(10, 11, 12, 13),
    "cu_prefix_lens": tensor(0, 3, 4),
    "accepted_lens": tensor(2, 0),
    "continuation_ids": tensor(20, 21, 22),
    "cu_continuation_lens": tensor(0, 1, 3),
    "prefix_logprobs": torch.tensor([-1.0, -2.0, -3.0, -4.0]),
    "continuation_logprobs": torch.tensor([-5.0, -6.0, -7.0]),
}


def test_hand_computed_packed(device) -> None:
    got = ops.assemble(**on(device, HAND))
    assert got.input_ids.tolist() == [1, 10, 11, 20, 2, 3, 21, 22]
    assert got.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert got.response_mask.int().tolist() == [0, 1, 1, 1, 0, 0, 1, 1]
    assert got.logprobs is not None
    assert got.cu_lens is not None
    assert got.logprobs.tolist() == [0, -1, -2, -5, 0, 0, -6, -7]
    assert got.cu_lens.tolist() == [0, 4, 8]
    assert got.attention_mask is None


def test_hand_computed_split(device) -> None:
    got = ops.assemble(**on(device, HAND), layout="split", pad_token_id=99, max_response_len=4)
    assert got.input_ids.tolist() == [[99, 1, 10, 11, 20, 99], [2, 3, 21, 22, 99, 99]]
    assert got.position_ids.tolist() == [[0, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 0]]
    assert got.attention_mask is not None
    assert got.logprobs is not None
    assert got.attention_mask.int().tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert got.response_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]]
    assert got.logprobs.tolist() == [[0, 0, -1, -2, -5, 0], [0, 0, -6, -7, 0, 0]]
    assert got.cu_lens is None


def test_hand_computed_contexts_padded_left_and_right(device) -> None:
    """Without continuations: what generation resumes from."""
    context = {name: value for name, value in HAND.items() if "continuation" not in name}
    context["prompt_ids"] = tensor(1, 2, 3, 4)
    context["cu_prompt_lens"] = tensor(0, 1, 4)
    context["accepted_lens"] = tensor(1, 1)
    left = ops.assemble(**on(device, context), layout="left", pad_token_id=99)
    assert left.input_ids.tolist() == [[99, 99, 1, 10], [2, 3, 4, 13]]
    assert left.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert left.response_mask.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    right = ops.assemble(**on(device, context), layout="right", pad_token_id=99)
    assert right.input_ids.tolist() == [[1, 10, 99, 99], [2, 3, 4, 13]]
    assert right.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert right.attention_mask is not None
    assert right.logprobs is not None
    assert right.attention_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert right.logprobs.tolist() == [[0, -1, 0, 0], [0, 0, 0, -4]]


@pytest.mark.slow
def test_many_threads_and_uneven_rows(generator) -> None:
    """More than one piece of work per thread: every layout holds the packed rows."""
    case = random_case(300, generator, continuations=True, logprobs=True, longest=700)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        packed = ops.assemble(**case)
        padded = {layout: ops.assemble(**case, layout=layout) for layout in LAYOUTS[1:]}
    finally:
        torch.set_num_threads(threads)
    one = reference(**{name: value for name, value in case.items()})
    assert_same(packed, one)
    for got in padded.values():
        tokens = got.attention_mask
        for name in ("input_ids", "position_ids", "response_mask", "logprobs"):
            assert torch.equal(getattr(got, name)[tokens], getattr(packed, name)), name
            if name != "input_ids":
                assert not getattr(got, name)[~tokens].any(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_beyond_a_limit(device, layout) -> None:
    case = on(device, HAND)

    def fails(match: str, **limits: int) -> None:
        with pytest.raises(ValueError, match=match):
            ops.assemble(**case, layout=layout, **limits)

    if device == "cpu" or layout == "packed":
        fails(
            "max_prompt_len: expected prompts of at most 1 tokens, got 2 in row 1",
            max_prompt_len=1,
            max_response_len=9,
        )
    fails("max_prompt_len: expected prompts of at most 1 tokens, got 2 in row 1", max_prompt_len=1)
    fails(
        "max_response_len: expected responses of at most 2 tokens, got .* in row 0",
        max_response_len=2,
    )
    fails("max_prompt_len: expected >= 0, got -1", max_prompt_len=-1)
    # Exactly at the limits.
    ops.assemble(**case, layout=layout, max_prompt_len=2, max_response_len=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layout": "middle"}, "layout: expected one of packed, right, left, split, got 'middle'"),
        ({"accepted_lens": tensor(2, 2)}, r"accepted_lens: expected 0 <= accepted_len <= 1 .*got 2 in row 1"),
        ({"accepted_lens": tensor(-1, 0)}, "accepted_lens: .*got -1 in row 0"),
        ({"accepted_lens": tensor(1, 0, 0)}, r"accepted_lens: expected shape \[batch = 2\], got \[3\]"),
        ({"accepted_lens": torch.zeros(2)}, "accepted_lens: expected int32 or int64, got float32"),
        ({"cu_prompt_lens": tensor(0, 1, 4)}, "cu_prompt_lens: expected to end at 3, got 4"),
        ({"cu_prompt_lens": tensor(0, 4, 3)}, "cu_prompt_lens: expected non-decreasing"),
        ({"cu_prefix_lens": tensor(1, 3, 4)}, "cu_prefix_lens: expected to start at 0, got 1"),
        ({"cu_prefix_lens": tensor(0, 3)}, r"cu_prefix_lens: expected shape \[batch \+ 1 = 3\], got \[2\]"),
        ({"cu_continuation_lens": tensor(0, 1, 2)}, "cu_continuation_lens: expected to end at 3, got 2"),
        ({"cu_continuation_lens": None}, "cu_continuation_lens: expected a tensor"),
        ({"continuation_ids": None}, "continuation_ids: expected a tensor"),
        ({"prompt_ids": torch.zeros(3)}, "prompt_ids: expected int32 or int64, got float32"),
        ({"prefix_ids": torch.zeros(2, 2).long()}, "prefix_ids: expected shape"),
        ({"prefix_logprobs": torch.zeros(3)}, "prefix_logprobs: expected shape .*= 4.*got .3"),
        ({"prefix_logprobs": torch.zeros(4).double()}, "prefix_logprobs: expected float32, got float64"),
        ({"prefix_logprobs": None}, "prefix_logprobs: expected a tensor with continuation_logprobs"),
        ({"continuation_logprobs": None}, "prefix_logprobs, continuation_logprobs: .* or of none"),
        ({"continuation_logprobs": torch.zeros(4)}, "continuation_logprobs: expected shape"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("limits", [{}, {"max_prompt_len": 8, "max_response_len": 8}])
def test_bad_input(layout, changes, match, limits) -> None:
    with pytest.raises(ValueError, match=match):
        ops.assemble(**{**HAND, "layout": layout, **limits, **changes})


def test_cuda_reports_what_does_not_fit() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ops.check_status()
    got = ops.assemble(**on("cuda", HAND), layout="split", max_prompt_len=1, max_response_len=9)
    with pytest.raises(ValueError, match="offsets"):
        ops.check_status()
    assert got.attention_mask is not None
    assert got.attention_mask.sum(1).tolist() == [4, 0]  # the row that does not fit is padding


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout) -> None:
    case = on(device, HAND)
    cu_lens = tensor(0, 4, 8).to(device) if layout == "packed" else None
    prompt_width = {"split": 2, "right": -1, "left": -1, "packed": -1}[layout]
    width = {"split": 6, "right": 5, "left": 5, "packed": 8}[layout]
    tensors = [case[name] for name in list(HAND)]
    args = (*tensors, cu_lens, LAYOUTS.index(layout), prompt_width, width, 99)
    opcheck(("assemble", args))


@pytest.mark.slow
def test_compiles_without_graph_break_when_the_size_is_given() -> None:
    def assembled(case):
        return ops.assemble(**case, layout="split", max_prompt_len=3, max_response_len=4)

    compiled = torch.compile(assembled, fullgraph=True, backend="aot_eager")(HAND)
    for got, expected in zip(compiled, assembled(HAND), strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["right", "left", "split"])
def test_out_is_overwritten_whole(device, layout, generator) -> None:
    limits = {"layout": layout, "max_prompt_len": 9, "max_response_len": 18, "pad_token_id": -7}
    first, second = (
        on(device, random_case(30, generator, continuations=True, logprobs=True)) for _ in range(2)
    )
    out = ops.assemble(**first, **limits)
    expected = ops.assemble(**second, **limits)
    assert not torch.equal(out.input_ids, expected.input_ids)
    assert ops.assemble(**second, **limits, out=out) is out
    assert_same(out, expected._asdict())


def test_out_that_does_not_fit_is_refused_and_kept(generator) -> None:
    case = random_case(4, generator, continuations=True, logprobs=True)
    limits = {"layout": "split", "max_prompt_len": 9, "max_response_len": 18}
    out = ops.assemble(**case, **limits)
    before = [None if t is None else t.clone() for t in out]

    def fails(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            ops.assemble(**{**case, **limits, "out": out, **changes})

    fails("out: expected None unless the layout is padded", layout="packed")
    fails("out: expected None unless .* both limits", max_prompt_len=None)
    fails(r"out: expected input_ids of shape \[4, 28\], got \[4, 27\]", max_prompt_len=10)
    fails("out: expected no logprobs", prefix_logprobs=None, continuation_logprobs=None)
    fails("out: expected the result of a padded layout", out=ops.assemble(**case))
    fails("input_ids: expected int64", out=out._replace(input_ids=out.input_ids.int()))
    fails("max_prompt_len|prompts of at most", max_prompt_len=1, max_response_len=26)
    for tensor_before, tensor_after in zip(before, out, strict=True):
        assert tensor_before is None or torch.equal(tensor_before, tensor_after)
