"""How the ops run on a GPU: captured in a graph, without waiting for the device, the same every
time, on any stream."""

from __future__ import annotations

import pytest
import torch
from gpu_calls import NAMES, NATIVE, make_call

from spec_rollout import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _snapshot(outputs) -> list[torch.Tensor]:
    """Bytes, so that NaNs compare."""
    return [t.contiguous().view(torch.uint8).clone() for t in outputs]


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_cuda_equals_cpu(name) -> None:
    on_cpu, on_gpu = make_call(name, "cpu")(), make_call(name)()
    for a, b in zip(on_cpu, on_gpu, strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(b.cpu(), a, atol=4e-6, rtol=1e-6, equal_nan=True)
        else:
            assert torch.equal(b.cpu(), a)
    ops.check_status()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "splice_kv, in place"])
def test_the_same_every_time(name) -> None:
    call = make_call(name)
    first = _snapshot(call())
    for _ in range(20):
        assert _same(_snapshot(call()), first)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name) -> None:
    call = make_call(name)
    call()  # compiles, and copies tables to the device, at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "splice_kv, in place"])
def test_a_captured_graph_gives_what_the_call_gives(name) -> None:
    call = make_call(name)
    expected = _snapshot(call())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for _ in range(2):
        for output in outputs:
            output.zero_()
        graph.replay()
        assert _same(_snapshot(outputs), expected)


@pytest.mark.parametrize("name", NATIVE)
def test_work_goes_to_the_current_stream(name) -> None:
    """Results are there when the stream that was current is done, with another one kept busy all
    the while."""
    call = make_call(name)
    if name == "splice_kv, in place":
        pytest.skip("changes its own input")
    expected = _snapshot(call())
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # the default stream
    with torch.cuda.stream(side):
        outputs = call()
        got = _snapshot(outputs)
    side.synchronize()
    assert not torch.cuda.default_stream().query()
    assert _same(got, expected)


def test_a_check_sees_what_any_stream_reports() -> None:
    logits = torch.zeros(1, 4, device="cuda")
    ids = torch.tensor([4], device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        ops.token_logprobs(logits, ids)
    with pytest.raises(ValueError, match="token_ids"):
        ops.check_status()
    ops.check_status()
