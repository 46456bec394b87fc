"""Ahead-of-time gate: compile every shipped kernel for GPUs that are not here, and refuse spills and double work.

``python -m attn_core.aot`` runs each operator's backend on meta tensors, compiles the kernels that it would have
started on each architecture, and prints their registers, stack and shared memory. The exit code is 1 if any of them
spills or computes a product in several warps alike (NVIDIA), needs more shared memory than a block may have, or does
not compile. No driver is needed.

``--json FILE`` keeps what was found; ``--base FILE`` fails kernels whose bound is lower than the one kept there.
"""

import argparse
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from attn_core import ops

from .kernels.launch import Launch, record
from .kernels.machine_code import Loop, hot_loop, load_bits, resident_blocks

MAX_REGISTERS = 255
# Bytes of shared memory that one block may have.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
}
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
LOST = 0.98  # of a bound: below it, the bound counts as lost


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs."""

    operator: str
    case: str
    kernel: str
    architecture: str
    options: str
    registers: int
    stack: int
    shared: int
    mma: int
    load: int
    blocks: int
    loop: Loop | None
    seconds: float
    failure: str | None


def operators() -> list[str]:
    """Operators that have Triton kernels to compile."""
    return [
        module.name
        for module in pkgutil.iter_modules(ops.__path__)
        if importlib.util.find_spec(f"{ops.__name__}.{module.name}.triton_backend") is not None
    ]


def recorded(operator: str, index: int, architecture: str, quick: bool) -> tuple[str, list[Launch]]:
    """Name and launches of one case."""
    backend = importlib.import_module(f"{ops.__name__}.{operator}.triton_backend")
    label, run = list(backend.aot_cases(quick))[index]
    with record(architecture) as launches:
        run()
    return label, launches


def compile_launch(operator: str, index: int, number: int, architecture: str, quick: bool) -> Report:
    """Compile one launch of one case. Launches cannot be pickled, so each process records its own."""
    label, launches = recorded(operator, index, architecture, quick)
    return _report(operator, label, launches[number], architecture)


def _report(operator: str, label: str, launch: Launch, architecture: str) -> Report:
    start = time.perf_counter()
    block = [str(launch.constants[name]) for name in ("BM", "BN", "BX") if name in launch.constants]
    options = f"{'×'.join(block)} w{launch.warps} s{launch.stages}"
    registers = stack = shared = mma = -1
    load = blocks = 0
    loop = None
    try:
        compiled = _compile(launch, architecture)
        shared = compiled.metadata.shared
        if architecture.startswith("sm_"):
            registers, stack, mma, code = _nvidia_resources(compiled.asm["cubin"])
            loop = hot_loop(code, launch.warps, architecture)
            load, blocks = load_bits(code), resident_blocks(registers, shared, launch.warps, architecture)
        else:
            registers, stack, mma = _amd_resources(compiled.asm["amdgcn"])
        failure = _failure(architecture, registers, stack, shared)
        if failure is None and not launch.repeats:
            failure = _repeated(compiled.asm["ttgir"])
    except Exception as raised:  # a kernel that does not compile is a finding of the gate, whatever the reason
        error: BaseException = raised
        while error.__cause__ is not None:
            error = error.__cause__
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    seconds = time.perf_counter() - start
    name = launch.kernel.__name__.removesuffix("_kernel")
    found = (registers, stack, shared, mma, load, blocks, loop, seconds, failure)
    return Report(operator, label, name, architecture, options, *found)


def _failure(architecture: str, registers: int, stack: int, shared: int) -> str | None:
    nvidia = architecture.startswith("sm_")
    if nvidia and stack > 0:  # on AMD the stack is printed only: its tiles are not tuned
        return f"spills: {stack} bytes of stack"
    if nvidia and registers > MAX_REGISTERS:
        return f"{registers} registers"
    if shared > SHARED_LIMIT[architecture]:
        return f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT[architecture]}"
    return None


def _repeated(code: str) -> str | None:
    """Which product of the intermediate code several warps compute alike: more warps than its result has tiles.

    Blackwell's products are of one warp, and AMD's tiles are not tuned.
    """
    layouts = {
        name: [int(n) for n in (*warps.split(","), *shape.split(",")[:2])]
        for name, warps, shape in re.findall(
            r"^(#\w+) = #ttg\.nvidia_mma<.*warpsPerCTA = \[([\d, ]+)\].*instrShape = \[([\d, ]+)\]", code, re.MULTILINE
        )
    }
    for rows, columns, name in re.findall(r"(?:tt\.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>", code):
        if name in layouts:  # else of plain multiplications
            down, across, height, width = layouts[name]
            copies = max(1, down * height // int(rows)) * max(1, across * width // int(columns))
            if copies > 1:
                return f"a product of {rows}×{columns} is computed {copies} times, by {down}×{across} warps"
    return None


def variant(launch: Launch, architecture: str) -> str:
    """What Triton keys compiled code by: launches of one kernel with equal variants share it."""
    _, _, specialization, options = _bound(launch, architecture)
    return f"{launch.kernel.__name__} {specialization} {options}"


def _bound(launch: Launch, architecture: str) -> tuple[Any, Any, Any, Any]:
    """A compiler backend, arguments by name, their specialization and options.

    What ``JITFunction.run`` does up to the point where it asks the driver for a device.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return backend, *bind(*launch.args, **launch.constants, **options)


def _compile(launch: Launch, architecture: str) -> Any:
    import triton
    from triton.compiler import ASTSource

    backend, arguments, specialization, options = _bound(launch, architecture)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, options, arguments, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=backend.target, options=parsed.__dict__)


def _nvidia_resources(cubin: bytes) -> tuple[int, int, int, str]:
    """Registers per thread, bytes of stack (local-memory instructions count as stack), tensor-core products, code."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, encoding="utf-8", check=True
        )
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, encoding="utf-8", check=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump prints no resource usage: {usage.stdout!r}")
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    products = len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b", code))
    return int(found[1]), int(found[2]) + spills, products, code


def _amd_resources(assembly: str) -> tuple[int, int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    stack = number("private_segment_fixed_size") + number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), stack, len(re.findall(r"\bv_mfma", assembly))


def run(architectures: list[str], names: list[str], quick: bool, jobs: int) -> Iterator[Report]:
    """Reports as they are ready; a kernel that several cases start alike is compiled once."""
    work = []
    seen = set()
    for name in names:
        backend = importlib.import_module(f"{ops.__name__}.{name}.triton_backend")
        for architecture in architectures:
            few = quick or not architecture.startswith("sm_")  # AMD: shown to compile, its tiles are not tuned
            for index in range(len(list(backend.aot_cases(few)))):
                for number, launch in enumerate(recorded(name, index, architecture, few)[1]):
                    key = (architecture, _identity(launch))
                    if key not in seen:
                        seen.add(key)
                        work.append((name, index, number, architecture, few))
    if jobs == 1:
        yield from (compile_launch(*task) for task in work)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(compile_launch, *zip(*work, strict=True))


def _identity(launch: Launch) -> str:
    kinds = [str(x.dtype) if isinstance(x, Tensor) else "none" if x is None else "" for x in launch.args]
    return f"{launch.kernel} {launch.constants} {launch.warps} {launch.stages} {kinds}"


COLUMNS = {
    "operator": 16, "case": 32, "kernel": 8, "arch": 7, "tile": 18, "reg": 4, "stack": 6, "shared": 7, "mma": 4,
    "TFLOP/s": 12, "s": 5
}  # fmt: skip


def line(*cells: object) -> str:
    """One line of the table; the last cell may be longer than any column."""
    *fixed, last = cells
    padded = [str(cell).ljust(width) for cell, width in zip(fixed, COLUMNS.values(), strict=True)]
    return " ".join([*padded, str(last)])


def described(r: Report) -> str:
    """One line of the table: what was compiled, what it needs, how long it took, what failed."""
    bound = f"{r.loop.teraflops:.0f} {r.loop.limiter}" if r.loop else ""
    resources = (r.registers, r.stack, r.shared, r.mma, bound, f"{r.seconds:.1f}", r.failure or "ok")
    return line(r.operator, r.case, r.kernel, r.architecture, r.options, *resources)


def row(r: Report) -> dict[str, Any]:
    """What ``--json`` keeps of a report."""
    bound = {"tflops": round(r.loop.teraflops), "limiter": r.loop.limiter} if r.loop else {}
    names = ("operator", "case", "kernel", "architecture", "options", "registers", "shared", "mma", "load", "blocks")
    return {**{name: getattr(r, name) for name in names}, **bound}


def lost(r: Report, kept: list[dict[str, Any]]) -> str | None:
    """How much lower the bound is than the one kept for the same kernel, case and architecture."""
    place = (r.operator, r.case, r.kernel, r.architecture)
    before = [x.get("tflops", 0) for x in kept if (x["operator"], x["case"], x["kernel"], x["architecture"]) == place]
    now = round(r.loop.teraflops) if r.loop else 0  # as it is kept
    # A kernel may be started several times in a case: the least of them counts, before and now.
    if before and now < LOST * min(before):
        return f"bound of {now} TFLOP/s, it was {min(before)}"
    return None


def _kept(file: Path, parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Rows of an earlier run by the same compiler; none where another release made them."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        made_by, rows = found["env"]["triton"], found["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--base: {file} holds no results: {error}")
    import triton

    if made_by != triton.__version__:
        print(f"note: bounds in {file} are those of Triton {made_by}, not compared with {triton.__version__}")
        return []
    return rows


def _write(file: Path, reports: list[Report]) -> None:
    import triton

    rows = ",\n".join("  " + json.dumps(row(report), ensure_ascii=False) for report in reports)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{"env": {{"triton": "{triton.__version__}"}},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Compile what the arguments name and print the table; 1 if anything failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m attn_core.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(SHARED_LIMIT), default=list(DEFAULT_ARCHITECTURES))
    parser.add_argument("--op", nargs="+", choices=operators(), default=operators())
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--quick", action="store_true", help="a few cases of each operator, below a minute")
    parser.add_argument("--failures", action="store_true", help="print only what fails")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--base", type=Path, metavar="FILE", help="earlier --json: a bound that is lost fails")
    arguments = parser.parse_args(argv)
    kept = _kept(arguments.base, parser) if arguments.base else []
    start = time.perf_counter()
    print(line(*COLUMNS, ""), flush=True)
    reports = []
    for report in run(arguments.arch, arguments.op, arguments.quick, arguments.jobs):
        report = replace(report, failure=report.failure or lost(report, kept))
        reports.append(report)
        if report.failure or not arguments.failures:
            print(described(report), flush=True)
    if arguments.json:
        _write(arguments.json, reports)
    failed = [report for report in reports if report.failure]
    most = max((report.registers for report in reports if report.architecture.startswith("sm_")), default=0)
    print(
        f"{len(reports)} kernels for {', '.join(arguments.arch)} in {time.perf_counter() - start:.0f} s: "
        f"{len(failed)} failed, at most {most} registers"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
