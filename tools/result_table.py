"""Tables of what recipes reach beside what papers print, from committed results of runs.

``python tools/result_table.py add RUN…`` takes the result of finished runs (directories that ``train`` writes) into
``packages/<package>/results/<recipe>.json``. Without arguments the tables between ``<!-- results -->`` and
``<!-- /results -->`` in the packages' READMEs are rewritten; ``--check`` changes nothing and exits with 1 if one is out
of date. The papers' numbers stand in ``packages/<package>/results/published.json``, in the order of the table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from model_table import with_table

ROOT = Path(__file__).resolve().parent.parent


def add(run: Path) -> Path:
    """Copy the result of a run; returns the file.

    Raises:
        ValueError: the directory holds no finished run, or one of a changed recipe.
    """
    try:
        about, result = (json.loads((run / name).read_text()) for name in ("run.json", "result.json"))
    except OSError:
        raise ValueError(f"{run} holds no finished run (run.json and result.json)") from None
    changed = [word for command in about["commands"] for word in command if word == "--set"]
    if changed:
        raise ValueError(f"{run} was trained with --set: only results of recipes as they are stand in tables")
    file = ROOT / "packages" / about["package"] / "results" / f"{about['recipe']}.json"
    kept = {key: about[key] for key in ("recipe", "started", "python", "machine", "device", "versions", "data_info")}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**kept, **result}, indent=1) + "\n", encoding="utf-8")
    return file


def result_table(folder: Path) -> str:
    """One row for each recipe with a published number and for each other recipe with a result."""
    published: list[dict[str, Any]] = json.loads((folder / "published.json").read_text(encoding="utf-8"))
    lines = ["| recipe | measured | paper | ours | minutes |", "|---|---|--:|--:|--:|"]
    for row in published:
        file = folder / f"{row['recipe']}.json"
        cells = [f"`{row['recipe']}`", row["what"], _shown(row, row["paper"]), "not run", "–"]
        if file.exists():
            result = json.loads(file.read_text(encoding="utf-8"))
            cells[3:] = [_shown(row, result["test"][row["metric"]]), f"{result['processor_seconds'] / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(row: dict[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if row["unit"] == "%" else f"{value:.3f}"


def main() -> int:
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
