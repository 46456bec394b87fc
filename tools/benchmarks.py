"""Benchmarks of every operator and package, and the page that shows them.

``python tools/benchmarks.py run`` measures, writes ``packages/*/results/bench/*.json`` and regenerates
``docs/reference/benchmarks.md`` with its pictures; ``page`` only regenerates; ``--check`` exits with 1 unless the page
and the pictures are what the JSON files give.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attn_core.bench.__main__ import operators, write_results
from attn_core.bench.case import OWN
from attn_core.bench.environment import environment
from attn_core.bench.plot import plot
from attn_core.catalog import did_you_mean

ROOT = Path(__file__).resolve().parent.parent
CORE = "attn-core"
# Result name → the command of a package whose rows go there; the first word is the package.
PACKAGES = {
    "detection": ["detection", "benchmark"],
    "medical_seg": ["medical-seg", "benchmark"],
    "seq_models": ["seq-models", "benchmark"],
    "vision_models": ["vision-models", "benchmark"],
    "vision_models_tokens": ["vision-models", "benchmark", "dhvt_tiny_imagenet_p16", "tap_rvt_tiny_plus"],
    "vision_models_gates": ["vision-models", "benchmark", "mambaout_femto", "spectformer_ti"],
    "vision_models_modules": ["vision-models", "benchmark", "--modules"],
    "vision_models_compiled": ["vision-models", "benchmark", "--compile"],
    "vlm_tools": ["vlm-tools", "benchmark"],
}
# A processor without AVX-512, as its libraries see it.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# Result name → options of the core's benchmark, and the environment it needs; every operator has its own name.
CORE_RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    **{name: (["--op", name], {}) for name in operators()},
    "linear_avx2": (["--op", "linear"], AVX2),
    "overhead": (["--op", "all", "--overhead"], {}),
}
# Columns of a package's rows that the line about the machine says already.
MACHINE = {"torch", "device", "threads", "date"}

HEAD = """# Benchmarks

<!-- Written by tools/benchmarks.py from packages/*/results/bench/*.json. Change those, not this page. -->

Absolute times belong to one machine; ratios within one table were measured in one run, provider after provider in
turns. **× ours** is a provider's median time divided by that of our fastest backend in the same pass. **error** is
max|x − reference| / max(1, max|reference|) against the float64 reference on the same rounded inputs: of the output
(forward), or the largest of all input gradients (forward+backward). **MiB** is the most memory held beyond the inputs.
Times are medians with the 20th and 80th percentile.

Repeat one: `python -m attn_core.bench --op block_attention`. All: `uv run python tools/benchmarks.py run`.
"""


class Places:
    """Where results, page and pictures are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.page = root / "docs" / "reference" / "benchmarks.md"
        self.images = self.page.parent / "images"

    def folder(self, package: str) -> Path:
        """Where a package's measurements lie."""
        return self.root / "packages" / package / "results" / "bench"

    def results(self) -> list[Path]:
        """The files of all packages: the core's first, each package's by name."""
        files = self.root.glob("packages/*/results/bench/*.json")
        return sorted(files, key=lambda file: (file.parts[-4] != CORE, file.parts[-4], file.name))


def run(places: Places, names: list[str], device: str, options: list[str]) -> None:
    """Measure operators and packages, one program after the other."""
    where = _slug(environment(device, 1)["gpu"]) if device.startswith("cuda") else "cpu"
    for name in names:
        print(f"== {name}", flush=True)
        target = places.folder(PACKAGES[name][0] if name in PACKAGES else CORE) / f"{name}_{where}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in PACKAGES:
            choice, variables = CORE_RUNS[name]
            program = [sys.executable, "-m", "attn_core.bench", *choice, "--device", device]
            # A cost of calls above its limit is a row like any other.
            checked = name != "overhead"
            subprocess.run([*program, "--json", target, *options], env={**os.environ, **variables}, check=checked)
            continue
        command, *verb = PACKAGES[name]
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            command = Path(sys.executable).parent / command
            subprocess.run([command, *verb, "--device", device, "--json", rows], check=True)
            write_results(target, {"env": environment(device, 2), "rows": json.loads(rows.read_text("utf-8"))})


def _slug(name: str) -> str:
    return "_".join(name.lower().replace("nvidia", "").split())


def page(places: Places) -> str:
    """The page as the result files give it."""
    sections = [HEAD]
    files = places.results()
    if not files:
        sections.append("No results are stored yet.\n")
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        sections.append(f"## {file.stem}\n\n{_machine(results['env'])}\n")
        if "op" not in results["rows"][0]:
            sections.append(_plain_table(results["rows"]))
            continue
        if any(row["length"] for row in results["rows"]):
            sections.append(f"![time and memory against length](images/{file.stem}.png)\n")
        sections.extend(_case_tables(results["rows"]))
    return "\n".join(sections)


def _machine(env: dict[str, Any]) -> str:
    processor = ", ".join(part for part in (env["cpu"], env.get("vectors"), f"{env['threads']} threads") if part)
    parts = [env["gpu"], None if env["gpu"] else processor, f"torch {env['torch']}"]
    parts += [env["triton"] and f"triton {env['triton']}", env["driver"] and f"driver {env['driver']}", env["date"]]
    parts.append(env["commit"] and f"commit {env['commit']}{' with changes' if env['dirty'] else ''}")
    return ", ".join(part for part in parts if part) + "."


def _case_tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows if not row["length"]):
        chosen = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        yield f"### {case} ({dtype})\n"
        lines = ["| pass | provider | ms | p20–p80 | × ours | MiB | TFLOP/s | GB/s | error |", "|---|---|" + "--:|" * 7]
        for row in (row for row in chosen if row["ms"] is not None):
            own = [r["ms"] for r in chosen if r["provider"] in OWN and r["pass"] == row["pass"] and r["ms"] is not None]
            spread = f"{_number(row['p20'])}–{_number(row['p80'])}"
            ratio = f"{row['ms'] / min(own):.2f}" if own else "–"
            cells = [row["pass"], _provider(row), _number(row["ms"]), spread, ratio, f"{row['mem_mb']:.1f}"]
            cells += [_number(row["tflops"]), _number(row["gbs"]), f"{row['err_vs_f64']:.1e}"]
            lines.append(f"| {' | '.join(cells)} |")
        yield "\n".join(lines) + "\n"
        remarks = [f"{_provider(row)}: {row['note']}." for row in chosen if row["note"] and row["ms"] is not None]
        remarks += [f"{_provider(row)} not run ({row['pass']}): {row['note']}." for row in chosen if row["ms"] is None]
        if remarks:
            yield "\n".join(f"- {remark}" for remark in dict.fromkeys(remarks)) + "\n"


def _provider(row: dict[str, Any]) -> str:
    return f"**attn-core {row['provider']}**" if row["provider"] in OWN else row["provider"]


def _plain_table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name not in MACHINE]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def pictures(places: Places) -> dict[Path, tuple[list[dict[str, Any]], str]]:
    """File → the rows it shows and their digest."""
    wanted = {}
    for file in places.results():
        rows = [row for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if row.get("length")]
        if rows:
            rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
            digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
            wanted[places.images / f"{file.stem}.png"] = rows, digest
    return wanted


def write(places: Places) -> None:
    """Write the page and its pictures."""
    places.page.parent.mkdir(parents=True, exist_ok=True)
    places.page.write_text(page(places), encoding="utf-8")
    for file, (rows, digest) in pictures(places).items():
        plot(rows, file, digest=digest)
    print(f"wrote {places.page.name} and {len(pictures(places))} pictures")


def check(places: Places) -> list[str]:
    """What differs from the result files."""
    from PIL import Image

    problems = []
    written = places.page.read_text(encoding="utf-8") if places.page.exists() else ""
    if written != page(places):
        problems.append(f"{places.page.name} is not what the result files give")
    wanted = pictures(places)
    for file, (_, digest) in wanted.items():
        if not file.exists():
            problems.append(f"{file.name} is missing")
            continue
        with Image.open(file) as image:
            if image.info.get("Description") != digest:
                problems.append(f"{file.name} shows other rows than its result file holds")
    stale = set(places.images.glob("*.png")) - set(wanted) if places.images.is_dir() else set()
    return problems + [f"{file.name} belongs to no result file" for file in sorted(stale)]


def main() -> int:
    """Measure, draw or check as the arguments say; 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run", "page"])
    parser.add_argument("--check", action="store_true", help="compare page and pictures with the result files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="operators or packages to measure (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything work?")
    parser.add_argument("--into", type=Path, default=ROOT, help="write below this folder instead of the repository")
    arguments = parser.parse_args()
    if arguments.check == (arguments.action is not None):
        parser.error("give one of run, page, --check")
    places = Places(arguments.into)
    if arguments.check:
        problems = check(places)
        for problem in problems:
            print(f"benchmarks: {problem}; run python tools/benchmarks.py page", file=sys.stderr)
        return 1 if problems else 0
    if arguments.action == "run":
        known = [*CORE_RUNS, *PACKAGES]
        for name in arguments.only or known:
            if name not in known:
                parser.error(f"--only: unknown name {name!r}{did_you_mean(name, known)}")
        quick = ["--quick"] if arguments.quick else []
        run(places, arguments.only or (operators() if arguments.quick else known), arguments.device, quick)
    write(places)
    return 0


if __name__ == "__main__":
    sys.exit(main())
