"""Tables of what recipes reach beside what papers print, from committed results of runs.

``python tools/result_table.py add RUN…`` takes the result of finished runs (directories that ``train`` writes) into
``packages/<package>/results/runs/<recipe>.json``, one entry for each seed and each choice of ``--set``. Without
arguments the tables between ``<!-- results -->`` and ``<!-- /results -->`` in the packages' READMEs are rewritten;
``--check`` changes nothing and exits with 1 if one is out of date. The rows, with the papers' numbers, stand in
``packages/<package>/results/published.json``.
"""

import argparse
import importlib
import json
import statistics
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from model_table import with_table

from attn_core.engine import TaskPackage
from attn_core.engine.run import open_run
from attn_core.flops import count_flops

ROOT = Path(__file__).resolve().parent.parent


def add(run: Path) -> Path:
    """Copy the result of a run; returns the file.

    Raises:
        ValueError: the directory holds no finished run.
    """
    try:
        about, result = (json.loads((run / name).read_text()) for name in ("run.json", "result.json"))
    except OSError:
        raise ValueError(f"{run} holds no finished run (run.json and result.json)") from None
    words = [word for command in about["commands"] for word in command]
    settings = sorted({value for name, value in pairwise(words) if name == "--set"})
    kept = {key: about[key] for key in ("started", "python", "machine", "device", "versions", "data_info")}
    entry = {"settings": settings, **size_of(run, about["package"]), **kept, **result}
    file = ROOT / "packages" / about["package"] / "results" / "runs" / f"{about['recipe']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = [other for other in _entries(file) if _key(other) != _key(entry)]
    file.write_text(json.dumps(sorted([*entries, entry], key=_key), indent=1) + "\n", encoding="utf-8")
    return file


def size_of(run: Path, package: str) -> dict[str, Any]:
    """Seed, parameters, and multiply-adds of one sample where the package can export the network (else None)."""
    described: TaskPackage = importlib.import_module(f"{package.replace('-', '_')}.cli").CLI
    opened = open_run(described.package, run, device="cpu")
    multiply_adds = None
    if described.export is not None:
        with suppress(ValueError):  # a network that cannot be exported
            target = described.export(opened)
            module = target.module.eval().requires_grad_(False)  # the counter follows a gradient into views, in vain
            multiply_adds = count_flops(lambda: module(*target.inputs)) // 2 // len(target.inputs[0])
    parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    return {"seed": opened.config["randomness"]["seed"], "parameters": parameters, "multiply_adds": multiply_adds}


def result_table(folder: Path) -> str:
    """One row for each entry of ``published.json``; several seeds give mean, least and most."""
    published: list[dict[str, Any]] = json.loads((folder / "published.json").read_text(encoding="utf-8"))
    lines = [
        "| recipe | measured | parameters | multiply-adds | paper | ours | core-minutes |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in published:
        settings = sorted(row.get("settings", []))
        file = folder / "runs" / f"{row['recipe']}.json"
        entries = [entry for entry in _entries(file) if entry["settings"] == settings]
        words = [row["recipe"], *(f"--set {setting}" for setting in settings)]
        cells = [f"`{' '.join(words)}`", row["what"], "–", "–", _shown(row, row["paper"]), "not run", "–"]
        if entries:
            values = [entry["test"][row["metric"]] for entry in entries]
            count, multiply_adds = entries[0]["parameters"], entries[0]["multiply_adds"]
            cells[2:4] = f"{count / 1e6:.2f} M", "–" if multiply_adds is None else f"{multiply_adds / 1e6:.1f} M"
            cells[5] = _shown(row, statistics.fmean(values))
            if len(values) > 1:
                cells[5] += f" ({_shown(row, min(values))} to {_shown(row, max(values))}, {len(values)} seeds)"
            cells[6] = f"{statistics.fmean(entry['processor_seconds'] for entry in entries) / 60:.1f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _entries(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def _key(entry: dict[str, Any]) -> tuple[list[str], int]:
    return entry["settings"], entry["seed"]


def _shown(row: dict[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if row["unit"] == "%" else f"{value:.3f}"


def main() -> int:
    """Take in runs, write or check the tables; 1 on a problem, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    parser.add_argument("verb", nargs="?", choices=["add"], help="take results of runs first")
    parser.add_argument("runs", nargs="*", type=Path, help="run directories")
    arguments = parser.parse_args()
    try:
        for run in arguments.runs:
            print(f"wrote {add(run).relative_to(ROOT)}")
    except ValueError as problem:
        print(f"result_table: {problem}", file=sys.stderr)
        return 1
    outdated = 0
    for numbers in sorted(ROOT.glob("packages/*/results/published.json")):
        readme = numbers.parents[1] / "README.md"
        text = readme.read_text(encoding="utf-8")
        changed = with_table(text, "results", result_table(numbers.parent))
        if changed == text:
            continue
        if arguments.check:
            outdated += 1
            where = readme.relative_to(ROOT)
            print(f"result_table: {where}: out of date; run python tools/result_table.py", file=sys.stderr)
        else:
            readme.write_text(changed, encoding="utf-8")
            print(f"wrote {readme.relative_to(ROOT)}")
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
