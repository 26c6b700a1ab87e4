"""The GPU benchmarks and the SASS report, as far as they run without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["bench_logits", "bench_packed"]


def _run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/gpu/{script}.py", *args],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_passes_its_checks_and_writes_every_row(script, tmp_path) -> None:
    done = _run(script, "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / f"{script.replace('bench', 'gpu')}.json").read_text())
    ops = {row["op"].partition(",")[0] for row in content["rows"]}
    if script == "bench_logits":
        assert ops == {"token_logprobs", "verify_prefix", "sample_tokens"}
        # Nothing is missing without a reason, and no peer of plain torch fails.
        for row in content["rows"]:
            assert not [r for r in row.get("absent", {}).values() if r.startswith("failed")], row
    else:
        assert ops == {"accept_prefix", "splice_kv", "assemble"}
        calls = json.loads((tmp_path / "gpu_calls.json").read_text())["rows"]
        assert "call of verify_prefix, empty batch" in {row["op"] for row in calls}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_there_is_one_line(script) -> None:
    done = _run(script)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == ("error: no CUDA device; --dry-run exercises the script without one\n")


def _sass_report():
    spec = importlib.util.spec_from_file_location("sass_report", ROOT / "tools" / "sass_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass_report"] = module
    spec.loader.exec_module(module)
    return module


# Two nested loops: the inner one, 0x0020 to 0x0050, reads memory; the outer one ends at 0x0070.
_SASS = """
		Function : _ZN3foo20token_logprobs_kernelINS_13BFloat16LogitEEEvS_
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0020*/                   {load} R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 FADD R1, R2, R3 ;
        /*0040*/                   {local} R1, R2, R3 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R1 ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_the_width_of_the_streaming_loops_loads_is_read_from_sass(monkeypatch, capsys) -> None:
    report = _sass_report()

    def kernels(load: str, local: str):
        sass = _SASS.replace("{load}", load).replace("{local}", local)
        ((name, code),) = report.instructions(sass)
        usage = f" Function {name}:\n  REG:40 STACK:0 SHARED:0 LOCAL:0\n"
        monkeypatch.setattr(report, "tool", lambda _: "cuobjdump")
        monkeypatch.setattr(
            report.subprocess,
            "run",
            lambda command, **_: subprocess.CompletedProcess(
                command, 0, stdout=usage if "-res-usage" in command else sass
            ),
        )
        return code, report.kernels_of(Path("x.cubin"), "90")

    code, (good,) = kernels("LDG.E.128.CONSTANT", "FMUL")
    assert len(report.streaming_loops(code)) == 1
    assert (good.name, good.registers) == ("token_logprobs_kernel<bfloat16>", 40)
    assert good.loops == ({128: 1},)
    assert report.report([("good", good)]) == 0
    _, (staged,) = kernels("LDGSTS.E.BYPASS.128", "LDGDEPBAR")
    assert not staged.faults
    _, (narrow,) = kernels("LDG.E.U16", "FMUL")
    assert narrow.faults == ["streaming loop with loads of 16 bits"]
    _, (spilled,) = kernels("LDG.E.128", "STL")
    assert spilled.faults == ["streaming loop with 1 accesses to local memory"]
    _, (none,) = kernels("MOV", "FMUL")
    assert none.faults == ["no loop streams a row"]
    assert report.report([("a", narrow), ("b", none)]) == 2
    assert "error: a: streaming loop with loads of 16 bits" in capsys.readouterr().err


# A loop that waits for copies and starts others, 0x0010 to 0x0060; in it one that reads single
# elements, 0x0040 to 0x0050.
_COPYING_SASS = """
		Function : sample_tokens_kernel
        /*0000*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0010*/                   DEPBAR.LE SB0, 0x1 ;
        /*0020*/                   LDGSTS.E.BYPASS.{bits} [R1], desc[UR4][R2.64] ;
        /*0030*/                   {local} R1, R2, R3 ;
        /*0040*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0050*/               @P0 BRA 0x40 ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/               @P1 BRA 0x0 ;
"""


@pytest.mark.parametrize(("bits", "local"), [("128", "FMUL"), ("64", "STL")])
def test_a_loop_of_asynchronous_copies_is_a_streaming_loop(bits, local) -> None:
    report = _sass_report()
    ((_, code),) = report.instructions(_COPYING_SASS.format(bits=bits, local=local))
    (body,) = report.streaming_loops(code)
    assert body == ["DEPBAR.LE", f"LDGSTS.E.BYPASS.{bits}", local, "BRA"]


def test_results_of_copied_files_name_their_commit(tmp_path, monkeypatch) -> None:
    from spec_rollout.runs.environment import git_commit

    monkeypatch.delenv("SPEC_ROLLOUT_COMMIT", raising=False)
    assert git_commit(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("SPEC_ROLLOUT_COMMIT", "0123abc")
    assert git_commit(tmp_path) == {"commit": "0123abc", "dirty": None}


def test_a_random_model_is_as_sure_as_it_was_asked_to_be(tmp_path, monkeypatch) -> None:
    """And its moved copy is as far from it. Vocabularies are small here; in the mean it holds."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import random_model
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    folders = [tmp_path / "model", tmp_path / "moved"]
    random_model.make(*folders, shape="tiny", dtype="float32", entropy=0.7, drift=0.05)
    assert AutoTokenizer.from_pretrained(folders[0])("1+1=")["input_ids"]
    ids = torch.randint(0, 4_096, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        old, new = (Qwen3ForCausalLM.from_pretrained(f)(ids).logits.flatten(0, 1) for f in folders)
    logp = old.double().log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).sum(dim=-1).mean()
    assert 0.5 < float(entropy) < 0.9
    assert float((new - old).std()) == pytest.approx(0.05, rel=0.1)
