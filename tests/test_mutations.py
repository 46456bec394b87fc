"""``tools/mutations.py`` and the list it wrote."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LISTED = json.loads((ROOT / "tests/mutations.json").read_text(encoding="utf-8"))
# A configuration of transformers' own network; two lines of attention; two files of eighty lines; gates of three lines;
# a network of timm's with two modules behind it, where the tool finds four places.
SMALL = ("LLaVA", "Identity", "Logit boost", "ELA", "Little attention", "ULSAM", "Sentence Attention Blocks")
SOURCE = """
class Block:
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return torch.cat([self.act(x).transpose(1, 2), x.detach()], 1).mean(-1)
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("mutations", None)
    import mutations  # pyright: ignore[reportMissingImports]

    return mutations


def test_mutations_drop_residuals_norms_activations_and_swap_orders(tool: ModuleType) -> None:
    found = {(m.kind, m.before, m.after) for m in tool.mutations("a.b", SOURCE)}
    assert {
        ("residual", "x + self.attn(self.norm1(x))", "x"),
        ("residual", "x + self.attn(self.norm1(x))", "self.attn(self.norm1(x))"),
        ("norm", "self.norm1(x)", "x"),
        ("activation", "self.act(x)", "x"),
        ("axes", "self.act(x).transpose(1, 2)", "self.act(x)"),
        ("gradient", "x.detach()", "x"),
    } <= found
    assert {kind for kind, _, _ in found} >= {"order", "mean"}
    for mutation in tool.mutations("a.b", SOURCE):
        assert mutation.source != SOURCE
        compile(mutation.source, "mutant", "exec")


def test_the_changed_source_is_what_is_imported(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = tool._Mutant("a_module_of_nobody", "nowhere.py", "value = 'changed'\n")
    monkeypatch.setattr(sys, "meta_path", [mutant, *sys.meta_path])
    import a_module_of_nobody  # type: ignore[import-not-found]

    assert a_module_of_nobody.value == "changed"
    del sys.modules["a_module_of_nobody"]


def test_a_choice_takes_kinds_and_files_in_turn(tool: ModuleType) -> None:
    pool = [tool.Mutation(f, 1, kind, "", str(n), "") for f in "ab" for kind in ("norm", "axes") for n in range(9)]
    picked = tool.chosen(pool, 8, 0)
    assert len({(m.module, m.kind) for m in picked[:4]}) == len({(m.module, m.kind) for m in picked[4:]}) == 4
    assert picked == tool.chosen(pool, 8, 0)


def test_every_family_is_listed_with_nineteen_of_twenty_mutants_killed() -> None:
    """Survivors with a reason are mutants that compute the same; the others count as missed."""
    cards = re.compile(r"Card\(\s*family=\"([^\"]+)\"")
    sources = [file.read_text(encoding="utf-8") for file in ROOT.glob("packages/*/src/**/*.py")]
    families = {family for source in sources for family in cards.findall(source)}
    assert LISTED.keys() == families - {"random sibling"}  # models that tests alone use
    for name, row in LISTED.items():
        reasons = [survivor for survivor in row["survivors"] if survivor.get("reason")]
        missed = row["mutations"] - row["killed"] - len(reasons)
        assert row["killed"] + len(row["survivors"]) == row["mutations"], name
        assert missed <= 0.05 * (row["mutations"] - len(reasons)), f"{name}: {missed} mutants live without a reason"
        assert row["mutations"] >= (0 if name in SMALL else 10), name
        assert len(reasons) <= 0.2 * row["mutations"], f"{name}: too many reasons"
