"""The steps of CONTRIBUTING.md, followed for a toy backbone, layer and recipe in a copy of vision-models."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "packages/vision-models"
SOURCE = f"{PACKAGE}/src/vision_models"

# File → text: new files, and what is put in front of the files that every change enters.
TOY: Mapping[str, str] = {
    f"{SOURCE}/layers/toy_gate.py": '''
"""A gate for toys."""

from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn


class ToyGate(nn.Module):
    """x plus x times a learned gate of it. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(x * self.gate(x).sigmoid())
''',
    f"{SOURCE}/models/toy.py": '''
"""Toy: convolutions and gates.

Shapes: image (B, 3, Y, X) → logits (B, num_classes).
"""

from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d
from timm.models import generate_default_cfgs
from torch import nn

from attn_core.catalog import Card
from vision_models.backbone import Stage, StagedBackbone
from vision_models.layers.toy_gate import ToyGate
from vision_models.registration import pretrained_cfg, timm_entries


class Toy(StagedBackbone):
    """The classification network."""

    def __init__(
        self, dim: int = 8, *, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        drop_rate: float = 0.0, drop_path_rate: float = 0.0, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        dims = [dim << i for i in range(4)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = nn.Conv2d(in_chans, dim, 3, 4, 1, **dd)
        stages, self.feature_info = [], []
        for i, width in enumerate(dims):
            down = nn.Conv2d(dims[i - 1], width, 3, 2, 1, **dd) if i else nn.Identity()
            stages.append(Stage(down, [ToyGate(width, drop_path_rate * i / 3, **dd)]))
            self.feature_info.append({"num_chs": width, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)


Toy.key_map = {}
VARIANTS: dict[str, dict[str, Any]] = {"toy_tiny": {"dim": 24}, "test_toy": {}}
default_cfgs = generate_default_cfgs({name: pretrained_cfg(96, first_conv="stem") for name in VARIANTS})
CARD = Card(family="Toy", paper="1706.03762", code="", license="", test="models/test_toy.py")
ENTRIES = timm_entries(Toy, VARIANTS, {name: CARD("Convolutions and gates") for name in VARIANTS}, default_cfgs)
''',
    f"{SOURCE}/configs/toy_digits.py": '''
"""Toy on the digits."""

from attn_core.engine import read_base
from vision_models.models.toy import Toy

epochs = 1
net = dict(type=Toy, in_chans=1, num_classes=10)

with read_base():
    from ._digits import *
''',
    f"{PACKAGE}/tests/models/test_toy.py": '''
"""Toy: what its paper claims."""

from typing import Any

import torch

from vision_models import create_model


def test_a_closed_gate_leaves_the_residual() -> None:
    model: Any = create_model("test_toy")
    block = model.stages[0].blocks[0]
    torch.nn.init.constant_(block.gate.bias, -1e4)
    x = torch.randn(2, 3, 3, 8)
    assert torch.equal(block(x), x)
''',
    "CHANGELOG.md": "- Toy: convolutions and gates.\n",
    "NOTICE": "Toy, re-implemented from the paper.\n",
}

# One process follows the rest of the steps, because each would spend most of its time on imports.
FOLLOW = """
import sys
import pytest

tests = [f"packages/vision-models/tests/{path}.py" for path in
         ("models/test_every_model", "models/test_toy", "pictures/test_explain")]
code = pytest.main(["-n0", "-p", "no:cacheprovider", "-k", "toy", "-m", "not compile", *tests])
from attn_core.engine.cli import run_cli  # pytest wants to see plugins first, which the engine's imports bring
from vision_models.cli import CLI

for words in (["info", "toy_tiny"], ["train", "toy_digits", "--out", "toy"]):
    try:
        run_cli(CLI, words)
    except SystemExit as stop:
        code = code or stop.code
sys.exit(code)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the toys."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / PACKAGE, copy / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for name in ("pyproject.toml", "conftest.py", "CHANGELOG.md", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    for name, text in TOY.items():
        path = copy / name
        shared = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(text.lstrip("\n") + shared, encoding="utf-8")
    return copy


def test_a_backbone_a_layer_and_a_recipe_touch_at_most_six_files(tree: Path) -> None:
    files = [path.relative_to(tree) for path in tree.rglob("*") if path.is_file()]
    touched = [f for f in files if not (ROOT / f).exists() or (ROOT / f).read_bytes() != (tree / f).read_bytes()]
    assert {path.as_posix() for path in touched} == set(TOY)
    assert len(touched) <= 6


@pytest.mark.slow
def test_contract_tests_commands_and_training_find_what_was_added(tree: Path) -> None:
    sources = [str(tree / PACKAGE / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources)}
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW], cwd=tree, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests, printed = done.stdout.split(" passed", 1)
    assert int(tests.split()[-1]) >= 15, "the contract runs on every model that the catalogue has"
    assert "toy_tiny" in printed
    assert "Convolutions and gates" in printed
    assert "test accuracy" in printed
