"""``python -m attn_core.bench``: time, memory and error of an operator beside its peers.

Exit code 1 if one of our backends is less exact than the tolerance table allows, or slower than in stored results.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from attn_core import bench, ops
from attn_core.catalog import did_you_mean
from attn_core.testing import TOLERANCE

from .case import BenchCase, UnavailableError
from .environment import environment
from .measure import Row, drawn, measure, wrong
from .overhead import overhead
from .plot import plot
from .regression import regressions

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


def operators() -> list[str]:
    """Operators that have a benchmark."""
    known = {module.name for module in pkgutil.iter_modules(bench.__path__)}
    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.name in known)


def cases_of(operator: str, device: str, quick: bool) -> list[BenchCase]:
    """The cases of one operator's benchmark; with ``quick`` small ones."""
    return importlib.import_module(f"{bench.__name__}.{operator}").cases(device, quick)


def main(argv: list[str] | None = None) -> int:
    """Measure and print what the arguments name; 1 if a limit or a comparison failed, else 0."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.overhead:
        return _overheads(operators() if arguments.op == "all" else [arguments.op], arguments.json, arguments.quick)
    if arguments.op == "all":
        parser.error("--op all is for --overhead; choose one operator")
    if arguments.threads < 1 or arguments.seconds <= 0:
        parser.error("--threads and --seconds must be positive")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'attn-core[bench]'")
    base = _stored(arguments.base, parser) if arguments.base else []
    device = arguments.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    names = arguments.dtype or ["bfloat16" if device.startswith("cuda") else "float32"]
    cases = _chosen(cases_of(arguments.op, device, arguments.quick), arguments.case, parser)
    if arguments.plot and not any(case.length for case in cases):
        parser.error("--plot draws the length sweep, and --case chose none of its cases")
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes lines to stderr at every measurement
    if arguments.list:
        _list(cases, DTYPES[names[0]], device)
        return 0

    start = time.perf_counter()
    rows: list[Row] = []
    for name in names:
        for case in cases:
            print(f"\n{case.name} ({name})")
            for row in measure(
                arguments.op,
                case,
                DTYPES[name],
                device,
                seconds=0.002 if arguments.quick else arguments.seconds,
                threads=arguments.threads,
                quick=arguments.quick,
            ):
                rows.append(row)
                print(line(row), flush=True)
    if arguments.json:
        env = environment(device, arguments.threads)
        write_results(arguments.json, {"env": env, "rows": rows})
    if arguments.plot:
        plot([row for row in rows if row["dtype"] == names[0]], arguments.plot)
    failed = [row for row in rows if wrong(row)]
    for row in failed:
        print(f"{row['case']}, {row['pass']}, {row['provider']}: error {row['err_vs_f64']:.1e}", file=sys.stderr)
    slower = regressions(rows, base)
    for text in slower:
        print(f"slower than in {arguments.base}: {text}", file=sys.stderr)
    print(f"\n{len(rows)} rows in {time.perf_counter() - start:.0f} s, {len(failed)} less exact than allowed")
    return 1 if failed or slower else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attn_core.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", required=True, choices=[*operators(), "all"], help="an operator; all: with --overhead")
    parser.add_argument("--overhead", action="store_true", help="cost of a call of 16 tokens beside torch's own")
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="only this case, or cases that start so (repeatable)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:N]")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time per function on a CPU (default 0.5)")
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile: does everything work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--base", type=Path, metavar="FILE", help="stored rows: fail where a ratio to a peer grew")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the length sweep (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="list cases and providers, run nothing")
    return parser


def _overheads(names: list[str], file: Path | None, quick: bool) -> int:
    """Print and write what a call costs; 1 if one costs more than its limit."""
    found = [overhead(name, **({"rounds": 1, "seconds": 0.001} if quick else {})) for name in names]
    for one in found:
        print(f"  {one.operator:<24} {one.own_us:7.1f} µs  {one.ratio:5.1f} × {one.base}, at most {one.limit:.0f}")
    if file:
        rows = [
            {"operator": o.operator, "µs": round(o.own_us, 1), "ratio": round(o.ratio, 1), "to": o.base} for o in found
        ]
        write_results(file, {"env": environment("cpu", 1), "rows": rows})
    return int(not quick and any(one.ratio > one.limit for one in found))


def _stored(path: Path, parser: argparse.ArgumentParser) -> list[Row]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--base: {path} holds no results: {error}")


def write_results(path: Path, results: dict[str, Any]) -> None:
    """JSON with one row per line, so that a diff shows which rows changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in results["rows"])
    env = json.dumps(results["env"], ensure_ascii=False)
    path.write_text(f'{{"env": {env},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")


def line(row: Row) -> str:
    """One row as text."""
    head = f"  {row['pass']:<17} {row['provider']:<26}"
    if row["ms"] is None:
        return f"{head} {row['note']}"
    spread = f"{row['p20']:.3g}–{row['p80']:.3g}"
    text = f"{head} {row['ms']:9.3f} ms  {spread:<15} {row['mem_mb']:9.1f} MiB  {row['tflops']:8.4f} TFLOP/s"
    return f"{text}  error {row['err_vs_f64']:.1e}" + (f"  ({row['note']})" if row["note"] else "")


def _chosen(cases: list[BenchCase], wanted: list[str] | None, parser: argparse.ArgumentParser) -> list[BenchCase]:
    if not wanted:
        return cases
    for name in wanted:
        if not any(case.name.startswith(name) for case in cases):
            parser.error(f"--case: unknown case {name!r}{did_you_mean(name, [case.name for case in cases])}")
    return [case for case in cases if case.name.startswith(tuple(wanted))]


def _list(cases: list[BenchCase], dtype: torch.dtype, device: str) -> None:
    for case in cases:
        print(case.name)
        inputs = drawn(case, dtype, device)
        for name, provider in case.providers.items():
            try:
                if not provider.compiles:
                    provider.prepare(inputs)
                reason = "compiled at its first call" if provider.compiles else "ready"
            except UnavailableError as missing:
                reason = f"missing: {missing}"
            print(f"  {name:<28} {reason}")


if __name__ == "__main__":
    sys.exit(main())
