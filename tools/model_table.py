"""Tables of models and operators in the READMEs, from the registries.

``python tools/model_table.py`` rewrites what stands between ``<!-- models -->`` and ``<!-- /models -->``, likewise
``operators``, ``blocks`` (of state spaces), and ``kernels`` from ``packages/attn-core/results/kernels.json``;
``--check`` changes nothing and exits with 1 if a table is out of date.
"""

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import attn_core
from attn_core.catalog import Card, Catalog
from attn_core.dispatch import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
# Packages with models.
PACKAGES = sorted({file.relative_to(ROOT).parts[1] for file in ROOT.glob("packages/*/src/*/models*")})

# SPDX's spelling; registries such as timm's write small letters.
LICENSES = {name.lower(): name for name in ("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause")}


def operator_table() -> str:
    """One row for each operator of attn_core: source, what it computes, backends, tests."""
    lines = ["| operator | computes | backends | source | tests |", "|---|---|---|---|---|"]
    for name in attn_core.__all__:
        operator = getattr(attn_core, name)
        folder = ROOT / "packages/attn-core/src/attn_core/ops" / name
        if not folder.is_dir():
            continue
        files = {"reference": "reference.py", "torch": "torch_backend.py", "triton": "triton_backend.py"}
        present = [backend for backend in BACKENDS if (folder / files[backend]).exists()]
        tests = [f"tests/test_every_op.py -k {name}"]
        tests += [f"tests/{file}" for file in (f"ops/test_{name}.py",) if (folder.parents[3] / "tests" / file).exists()]
        cells = [f"`{name}`", _summary(operator), ", ".join(present), f"`src/attn_core/ops/{name}/`"]
        lines.append(f"| {' | '.join([*cells, ' · '.join(f'`{test}`' for test in tests)])} |")
    return "\n".join(lines)


def kernel_table(architecture: str = "sm_90") -> str:
    """One row for each kernel with tensor-core products that the quick gate compiles for an architecture."""
    rows = json.loads((ROOT / "packages/attn-core/results/kernels.json").read_text(encoding="utf-8"))["rows"]
    head = "operator, case | kernel | tile | registers | shared KiB | blocks | loads, bits | bound, TFLOP/s | limit"
    lines = [f"| {head} |", "|---|---|---|--:|--:|--:|--:|--:|---|"]
    for row in rows:
        if row["architecture"] == architecture and "tflops" in row:
            cells = [f"{row['operator']}, {row['case']}", row["kernel"], row["options"], row["registers"]]
            cells += [f"{row['shared'] / 1024:.1f}", row["blocks"], row["load"], row["tflops"], row["limiter"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def model_table(package: str, *, tests_at: str) -> str:
    """One row for each model of a package; small siblings for tests are left out.

    Args:
        tests_at: path of the package's tests as seen from the file that shows the table.
    """
    models = _models(package)
    lines = ["| model | parameters | published | paper | official code | parity test |", "|---|--:|---|---|---|---|"]
    for name, card in _cards(package).items():
        with torch.device("meta"):
            model = models.create_model(name)
        parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
        cells = [f"`{name}`", parameters, card.published or "–", *_sources(card), f"`{tests_at}/{card.test}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def family_table() -> str:
    """One row for each published system of all packages."""
    lines = ["| system | variants | package | paper | official code | parity test |", "|---|--:|---|---|---|---|"]
    for package in PACKAGES:
        families: dict[str, list[Card]] = {}
        for card in [*_cards(package).values(), *_other_cards(package)]:
            families.setdefault(card.family, []).append(card)
        for family, cards in families.items():
            place, tests = f"[`{package}`](packages/{package})", f"`packages/{package}/tests/{cards[0].test}`"
            cells = [family, str(len(cards)), place, *_sources(cards[0]), tests]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def state_space_table() -> str:
    """One row for each state-space block of medical-seg: what the survey asks of it, and its counted cost."""
    from medical_seg.bench.state_spaces import cost
    from medical_seg.layers.state_space import BLOCKS

    counted = "parameters | multiply-adds | kept for backward"
    lines = [f"| block | family | scan | axes | modality | {counted} | paper | official code |"]
    lines.append("|---|---|---|---|---|--:|--:|--:|---|---|")
    for name, entry in BLOCKS.entries.items():
        card: Any = entry.card
        found = cost(name)
        cells = [f"`{name}`", card.kind, card.scan, ", ".join(map(str, card.dims)), card.modality]
        cells += [f"{found.parameters:,}", f"{found.multiply_adds / 1e6:.1f} M", f"{found.kept / 2**20:.1f} MiB"]
        lines.append(f"| {' | '.join([*cells, *_sources(card)])} |")
    return "\n".join(lines)


def _models(package: str) -> ModuleType:
    return importlib.import_module(f"{package.replace('-', '_')}.models")


def _cards(package: str) -> dict[str, Card]:
    models = _models(package)
    return {name: models.card(name) for name in models.list_models() if not name.startswith("test_")}


def _other_cards(package: str) -> list[Card]:
    """Of what stands in catalogues beside the models: modules that are added to networks."""
    models = _models(package)
    listed = set(models.list_models())
    others = [face for face in vars(models).values() if isinstance(face, Catalog)]
    found = {name: entry.card for face in others for name, entry in face.entries.items() if name not in listed}
    return [card for name, card in found.items() if not name.startswith("test_")]


def _sources(card: Card) -> list[str]:
    """Cells of the paper and of the official code."""
    arxiv = re.fullmatch(r"\d{4}\.\d{4,5}", card.paper)
    paper = f"[arXiv {card.paper}](https://arxiv.org/abs/{card.paper})" if arxiv else f"[paper]({card.paper})"
    repository = "/".join(card.code.split("/")[3:5])
    licence = LICENSES.get(card.license.lower(), card.license) or "no licence named"
    return [paper, f"[{repository}]({card.code}) ({licence})" if card.code else "none released"]


def _summary(operator: Callable[..., object]) -> str:
    return (inspect.getdoc(operator) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`").rstrip(".")


def tables() -> dict[Path, dict[str, str]]:
    """README → name of the marker → table."""
    wanted = {ROOT / "packages/attn-core/README.md": {"operators": operator_table()}}
    for package in PACKAGES:
        wanted[ROOT / f"packages/{package}/README.md"] = {"models": model_table(package, tests_at="tests")}
    wanted[ROOT / "docs/explanation/which-state-space-block.md"] = {"blocks": state_space_table()}
    wanted[ROOT / "README.md"] = {"models": family_table()}
    wanted[ROOT / "docs/explanation/kernels-without-a-gpu.md"] = {"kernels": kernel_table()}
    return wanted


def with_table(text: str, marker: str, table: str) -> str:
    """The text with ``table`` between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    between = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"there is no <!-- {marker} --> … <!-- /{marker} -->")
    return between.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def main() -> int:
    """Write the tables, or with ``--check`` compare; 1 if one differs or has no place, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    arguments = parser.parse_args()
    problems = 0
    for file, wanted in tables().items():
        text = changed = file.read_text(encoding="utf-8")
        for marker, table in wanted.items():
            try:
                changed = with_table(changed, marker, table)
            except ValueError as problem:
                problems += 1
                print(f"model_table: {file.relative_to(ROOT)}: {problem}", file=sys.stderr)
        if changed == text:
            continue
        if arguments.check:
            problems += 1
            print(
                f"model_table: {file.relative_to(ROOT)}: out of date; run python tools/model_table.py", file=sys.stderr
            )
        else:
            file.write_text(changed, encoding="utf-8")
            print(f"wrote {file.relative_to(ROOT)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
