"""Each member's wheel: what is in it, and that it works where only its own requirements are."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = [file.parent.name for file in sorted(ROOT.glob("packages/*/pyproject.toml"))]
# What a wheel must do without any extra.
SMOKE = {
    "attn-core": """
import torch
from attn_core import attention, block_attention, explain, linear, window_index
from attn_core.nn import Linear, through_gelu

q = torch.randn(1, 2, 16, 8, requires_grad=True)
index = window_index(4, 4, (2, 2))
out = attention(q, q, q)[0] + block_attention(q, q, q, index, index)[0]
through_gelu(Linear(8, 3), out).sum().backward()
assert q.grad is not None and explain("linear", out[0, 0], torch.eye(8))["torch"] == "chosen automatically"
""",
    "detection": """
import torch
from detection.models import create_model

found = create_model("test_plain_detr").eval()([torch.rand(3, 64, 96)])
assert found[0]["boxes"].shape[1] == 4
""",
    "medical-seg": """
import torch
from medical_seg.models import create_model

assert create_model("test_agunet", out_channels=3).eval()(torch.rand(1, 1, 32, 32, 32)).shape == (1, 3, 32, 32, 32)
""",
    "seq-models": """
import torch
from seq_models import create_model

tokens = create_model("test_titans_mac").generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
assert tokens.shape == (1, 5)
""",
    "vlm-tools": """
import torch
from vlm_tools import LogitBoost, intervene
from vlm_tools.testing.random_models import random_inputs, random_model

model = random_model("test_llava")
with torch.no_grad(), intervene(model, LogitBoost(1.0)) as run:
    model(**random_inputs("test_llava"))
assert len(run.report()) == 3
""",
    "vision-models": """
import torch
import vision_models

model = vision_models.create_model("test_biformer", num_classes=3)
assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
""",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    built = {}
    for member in MEMBERS:
        command = ["uv", "build", "--wheel", "--quiet", "--out-dir", str(folder), str(ROOT / "packages" / member)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (built[member],) = folder.glob(f"{member.replace('-', '_')}-*.whl")
    return built


def test_every_member_has_a_smoke_test() -> None:
    assert set(SMOKE) == set(MEMBERS)


@pytest.mark.parametrize("member", MEMBERS)
def test_wheel_holds_package_types_and_licence_and_no_tests(member: str, wheels: dict[str, Path]) -> None:
    module = member.replace("-", "_")
    with zipfile.ZipFile(wheels[member]) as archive:
        names = archive.namelist()
        (metadata,) = (
            archive.read(name).decode() for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
        )
    assert f"{module}/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert [name for name in names if not name.startswith((f"{module}/", f"{module}-"))] == []
    source = ROOT / "packages" / member / "src"
    files = [file for file in source.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {file.relative_to(source).as_posix() for file in files} <= set(names)
    assert "file://" not in metadata


@pytest.mark.parametrize("member", MEMBERS)
def test_wheel_imports_where_only_its_requirements_are(member: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    """Installed with its siblings into an empty environment; of the rest, only the closure of its requirements."""
    project = tomllib.loads((ROOT / "packages" / member / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(requirement).name for requirement in project["dependencies"]}
    environment = tmp_path / "venv"
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    siblings = [str(wheels[name]) for name in MEMBERS if name == member or name in needed]
    install = ["uv", "pip", "install", "--quiet", "--no-deps", "--offline", "--python", str(python), *siblings]
    subprocess.run(install, check=True)

    allowed = _closure(needed | {"jaxtyping"})
    of_package = importlib.metadata.packages_distributions()
    blocked = [
        name
        for name, distributions in of_package.items()
        if not {_normal(distribution) for distribution in distributions} & allowed
    ]
    code = f"{_BLOCK.format(blocked=blocked, path=sysconfig.get_path('purelib'))}\n{SMOKE[member]}"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, encoding="utf-8", check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# The workspace's packages behind the environment's own, without those that the wheel may not need.
_BLOCK = """
import sys
from importlib.machinery import PathFinder

class Remaining(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else PathFinder.find_spec(name, path, target)

sys.path.append({path!r})
sys.meta_path[sys.meta_path.index(PathFinder)] = Remaining
assert Remaining.find_spec("pytest") is None
"""


def _closure(names: set[str]) -> set[str]:
    """Distributions that installing ``names`` would bring, without extras; members count as themselves."""
    seen: set[str] = set()
    waiting = {_normal(name) for name in names}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        try:
            listed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        for requirement in map(Requirement, listed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting |= {_normal(requirement.name)} - seen
    return seen


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
