"""What the compilers made of the kernels over logits: registers, spills, and the loads of the loops
that stream a row, from SASS.

    python tools/sass_report.py [--arch 90] [--object FILE.{o,so} ...] [--triton-only | --no-triton]

Compiles csrc/cuda/{token_logprobs,verify_prefix,sample_tokens}.cu (or takes what is compiled
already) and the Triton kernels, disassembles them and prints one line per kernel. Exits with 1 if a
loop that streams a row has a load narrower than 128 bits or an access to local memory, or if a
kernel has no such loop; with 3 if nvcc or cuobjdump is missing. Needs no GPU, and no package but
triton for the Triton kernels (whose wheel brings a cuobjdump).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("token_logprobs", "verify_prefix", "sample_tokens")
NO_TOOL = 3

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


class ToolMissingError(RuntimeError):
    """A compiler or disassembler that is not on this machine."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin.

    Attributes:
        registers: Per thread.
        local_accesses: Instructions that read or write local memory. Outside the inner loops these
            may also be registers that a function saves for its caller.
        local_in_loops: Those within `loops`.
        loops: Of each loop that streams a row, the loads from global memory by width in bits.
    """

    name: str
    registers: int
    local_accesses: int
    local_in_loops: int
    loops: tuple[Counter[int], ...]

    @property
    def faults(self) -> list[str]:
        found = []
        if not self.loops:
            found.append("no loop streams a row")
        narrow = sorted({width for loop in self.loops for width in loop if width < 128})
        if narrow:
            found.append(f"streaming loop with loads of {', '.join(map(str, narrow))} bits")
        if self.local_in_loops:
            found.append(f"streaming loop with {self.local_in_loops} accesses to local memory")
        return found


def tool(name: str) -> str:
    """Path of a CUDA tool: $NAME, on PATH, beside nvcc, or in triton's wheel.

    Raises:
        ToolMissingError: if there is none.
    """
    places = [os.environ.get(name.upper()), shutil.which(name)]
    places += [str(folder / name) for folder in Path("/usr/local").glob("cuda*/bin")]
    spec = importlib.util.find_spec("triton")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    folders += (ROOT / ".venv").glob("lib/python*/site-packages/triton")
    places += [str(folder / "backends/nvidia/bin" / name) for folder in folders]
    for place in places:
        if place and os.access(place, os.X_OK):
            return place
    raise ToolMissingError(f"{name} is neither on PATH nor in an installed triton")


def instructions(sass: str) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
    """(function, [(address, opcode, operands)]) of the output of `cuobjdump -sass`."""
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        yield (
            name.strip(),
            [(int(a, 16), op, args.strip()) for a, op, args in _INSTRUCTION.findall(body)],
        )


def all_loops(code: Sequence[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """(first, last) address of each loop: a branch back is one."""
    loops = set()
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)$", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            loops.add((int(target[1], 16), address))
    return sorted(loops)


def streaming_loops(code: Sequence[tuple[int, str, str]]) -> list[list[str]]:
    """Opcodes of each loop that streams a row of logits, without those of loops within it.

    That is a loop that waits for asynchronous copies and starts others; and, where it is in none of
    these, an innermost loop that reads global memory. (Within, a loop over the few tokens that may
    win a draw reads them one by one.)
    """
    loops = all_loops(code)

    def within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
        return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]

    def own(loop: tuple[int, int]) -> list[str]:
        nested = [other for other in loops if within(other, loop)]
        return [
            opcode
            for address, opcode, _ in code
            if loop[0] <= address <= loop[1] and not any(a <= address <= b for a, b in nested)
        ]

    bodies = {loop: own(loop) for loop in loops}
    copying = [
        loop
        for loop, body in bodies.items()
        if "DEPBAR.LE" in body and any(opcode.startswith("LDGSTS") for opcode in body)
    ]
    copying = [loop for loop in copying if not any(within(other, loop) for other in copying)]
    found = []
    for loop, body in bodies.items():
        innermost = not any(within(other, loop) for other in loops)
        reads = any(load_width(opcode) is not None for opcode in body)
        outside = not any(within(loop, other) for other in copying)
        if loop in copying or (innermost and reads and outside):
            found.append(body)
    return found


def load_width(opcode: str) -> int | None:
    """Bits of a load from global memory; None for other instructions."""
    # LDGSTS copies to shared memory; LDGDEPBAR only closes a group of such copies.
    if opcode == "LDGDEPBAR" or not (opcode.startswith("LDG") or re.match(r"LD\.E", opcode)):
        return None
    for mark, width in ((".128", 128), (".64", 64), (".U16", 16), (".S16", 16), (".U8", 8)):
        if mark in opcode:
            return width
    return 32


def is_local(opcode: str) -> bool:
    return opcode.startswith(("LDL", "STL"))


def short_name(mangled: str) -> str:
    """Name and element type of a kernel of csrc/cuda; Triton's names are plain."""
    match = re.search(r"\d+([a-z_]+_kernel)I.*?\d+((?:B?Float)\d+)Logit", mangled)
    return f"{match[1]}<{match[2].lower()}>" if match else mangled


def kernels_of(path: Path, arch: str) -> list[Kernel]:
    """The kernels of an object file or cubin."""
    cuobjdump = tool("cuobjdump")
    select = [] if path.suffix == ".cubin" else ["-arch", f"sm_{arch}"]

    def dump(what: str) -> str:
        command = [cuobjdump, what, *select, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function ([^\s:]+):\s*\n\s*(.*REG:.*)", dump("-res-usage"))
    }
    found = []
    for name, code in instructions(dump("-sass")):
        # An extension has other kernels, too.
        if path.suffix == ".so" and not any(f"{source}_kernel" in name for source in SOURCES):
            continue
        loops, local_in_loops = [], 0
        for opcodes in streaming_loops(code):
            loops.append(Counter(w for op in opcodes if (w := load_width(op)) is not None))
            local_in_loops += sum(map(is_local, opcodes))
        local = sum(is_local(opcode) for _, opcode, _ in code)
        registers = usage[name]["REG"]
        found.append(Kernel(short_name(name), registers, local, local_in_loops, tuple(loops)))
    return sorted(found, key=lambda kernel: kernel.name)


def compile_native(name: str, arch: str, folder: Path) -> Path:
    """The cubin of csrc/cuda/<name>.cu."""
    cubin = folder / f"{name}.cubin"
    command = [
        os.environ.get("NVCC") or tool("nvcc"), "-std=c++17", "-O3", "-DSPEC_ROLLOUT_WITH_CUDA",
        f"-I{ROOT / 'csrc' / 'include'}", "-Xcompiler=-ffp-contract=off", "-cubin",
        f"-arch=sm_{arch}", str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", str(cubin),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return cubin


_POINTERS = {
    "logits": "*{dtype}", "draft_ids": "*i64", "token_ids": "*i64", "draft_logprobs": "*fp32",
    "cu_draft_lens": "*i64", "cu_logits_lens": "*i64", "keys": "*i64", "positions": "*i64",
    "temperatures": "*fp32", "top_ks": "*i64", "top_ps": "*fp32", "logprobs": "*fp32",
    "first_rejection": "*i32", "next_ids": "*i32", "next_logprobs": "*fp32", "status": "*i32",
    "accepted_lens": "*i32", "next_token_ids": "*i32",
}  # fmt: skip
_FLOATS = ("inv_temperature", "top_p", "log_lenience", "scale", "min_target_logprob")
_INF_BITS = {"fp32": 0x7F800000, "bf16": 0x7F80, "fp16": 0x7C00}


def compile_triton(arch: str, folder: Path) -> Iterator[Path]:
    """Cubins of the Triton kernels, named after what they are compiled for."""
    if importlib.util.find_spec("triton") is None:
        raise ToolMissingError("triton is not installed")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ToolMissingError("TRITON_INTERPRET is set: triton interprets, it does not compile")
    sys.path.insert(0, str(ROOT))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spec_rollout.ops.triton.token_logprobs import token_logprobs_kernel
    from spec_rollout.ops.triton.verify_prefix import finish_drafts_kernel, test_drafts_kernel

    def build(kernel, label: str, dtype: str, constants: dict[str, object]) -> Path:
        signature, constexprs, attributes = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], constexprs[(index,)] = "constexpr", constants[name]
            elif name in _POINTERS:
                signature[name] = _POINTERS[name].format(dtype=dtype)
            else:
                signature[name] = "fp32" if name in _FLOATS else "i32"
            # What real calls have: aligned tensors, and vocabularies and strides in multiples of
            # 16.
            if name in _POINTERS or name in ("row_stride", "vocab"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs, attributes),
            target=GPUTarget("cuda", int(arch), 32),
            options={"num_warps": 8, "enable_fp_fusion": False},
        )
        path = folder / f"{kernel.__name__} {label} {dtype}.cubin"
        path.write_bytes(compiled.asm["cubin"])
        return path

    for dtype in _INF_BITS:
        vec = 4 if dtype == "fp32" else 8
        sizes = {"BLOCK": 256 * 32, "VEC": vec, "temperatures": None}
        yield build(token_logprobs_kernel, "", dtype, sizes)
        for rule, label in enumerate(("lenient", "coupled", "one-hot")):
            constants = {
                "RULE": rule, "REUSES_ALL": False, "REUSES_NONE": False, "GREEDY": 0,
                "FILTERED": False, "BITS": 128 // vec, "INF_BITS": _INF_BITS[dtype],
                "BLOCK": 256 * 16, "VEC": vec, "cu_logits_lens": None, "temperatures": None,
                "top_ks": None, "top_ps": None,
            }  # fmt: skip
            if rule != 0:
                constants["draft_logprobs"] = None
            for kernel in (test_drafts_kernel, finish_drafts_kernel):
                if kernel is finish_drafts_kernel and label == "coupled":
                    continue  # reads no logits: the test has drawn the token
                used = {k: v for k, v in constants.items() if k in kernel.arg_names}
                yield build(kernel, label, dtype, used)


def report(kernels: Sequence[tuple[str, Kernel]]) -> int:
    """Prints one line per kernel; the number of those at fault."""
    width = max(len(label) for label, _ in kernels)
    for label, kernel in kernels:
        kinds = Counter(
            " + ".join(f"{count} x {bits}" for bits, count in sorted(loop.items()))
            for loop in kernel.loops
        )
        loops = "; ".join(f"{kind} in {count}" for kind, count in kinds.items())
        print(
            f"{label:<{width}}  {kernel.registers:3d} registers, "
            f"{kernel.local_accesses} local accesses ({kernel.local_in_loops} in streaming loops), "
            f"loads of streaming loops (bits): {loops or 'none'}"
        )
    bad = [(label, fault) for label, kernel in kernels for fault in kernel.faults]
    for label, fault in bad:
        print(f"error: {label}: {fault}", file=sys.stderr)
    return len(bad)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--arch", default="90", help="compute capability without the point")
    options.add_argument("--object", type=Path, nargs="*", help="compiled files to read instead")
    which = options.add_mutually_exclusive_group()
    which.add_argument("--triton-only", action="store_true")
    which.add_argument("--no-triton", action="store_true")
    args = options.parse_args(argv)
    found: list[tuple[str, Kernel]] = []
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if args.object:
                paths = list(args.object)
            elif args.triton_only:
                paths = []
            else:
                paths = [compile_native(source, args.arch, folder) for source in SOURCES]
            for path in paths:
                found += [(kernel.name, kernel) for kernel in kernels_of(path, args.arch)]
            if not args.object and not args.no_triton:
                for path in compile_triton(args.arch, folder):
                    found += [(path.stem, kernel) for kernel in kernels_of(path, args.arch)]
    except ToolMissingError as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_TOOL
    if not found:
        print("error: no kernel found", file=sys.stderr)
        return 1
    return 1 if report(found) else 0


if __name__ == "__main__":
    sys.exit(main())
