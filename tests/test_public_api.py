"""What the packages offer by name, and what importing the core loads."""

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [file.parent.name.replace("-", "_") for file in sorted(ROOT.glob("packages/*/pyproject.toml"))]
# Programs, recipes, and kernels, which need a package that not every platform has.
NOT_IMPORTED = ("__main__", "configs", "triton_")


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    yield root
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        if not any(part.startswith(NOT_IMPORTED) for part in module.name.split(".")):
            yield importlib.import_module(module.name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_in_all_exists_and_is_documented(package: str) -> None:
    for module in _modules(package):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                inherited = inspect.isclass(value) and any(value.__doc__ == base.__doc__ for base in value.__mro__[1:])
                assert value.__doc__, f"{module.__name__}.{name} has no docstring"
                assert not inherited, f"{module.__name__}.{name} has only its base's docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package: str) -> None:
    assert [module.__name__ for module in _modules(package) if not module.__doc__] == []


def _loaded_by(statement: str, after: str = "") -> set[str]:
    """Names of the modules that a fresh interpreter loads for ``statement``; a warning is an error."""
    code = (
        f"import json, sys\n{after}\nold = set(sys.modules)\n{statement}\nprint(json.dumps([*set(sys.modules) - old]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_attn_core_loads_torch_and_jaxtyping_and_no_kernel_or_engine() -> None:
    loaded = _loaded_by("import attn_core", after="import torch, jaxtyping")
    foreign = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"attn_core"}
    assert {name for name in foreign if not name.startswith("_")} == set()
    heavy = ("attn_core.engine", "attn_core.bench", "attn_core.testing")
    assert [name for name in loaded if name.startswith(heavy) or name.endswith("triton_backend")] == []


HELP_OF_EVERY_VERB = """
import contextlib, importlib, io, json, sys, torch, jaxtyping, typer, rich.console, rich.table
from attn_core.engine.cli import build_cli, run_cli
before = set(sys.modules)
for package in ("detection", "medical_seg", "seq_models", "vision_models", "vlm_tools"):
    sys.argv = ["/bin/" + package.replace("_", "-")]
    task = importlib.import_module(package + ".cli").CLI
    for verb in [None, *typer.main.get_command(build_cli(task)).commands]:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
            run_cli(task, [*([verb] if verb else []), "--help"])
        assert "Usage" in text.getvalue(), (package, verb)
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_help_of_every_verb_loads_torch_and_what_prints_it() -> None:
    """Not timm, transformers, torchvision or mmengine, which take longer than torch (tools/import_time.py)."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_EVERY_VERB], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    print_it = {"typer", "click", "rich", "markdown_it", "mdurl", "pygments"}
    print_it |= {"pydantic", "pydantic_core", "annotated_types", "typing_inspection"}  # typer's
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert loaded - print_it - {*PACKAGES, *sys.stdlib_module_names} == set()


# That the import of a script registers them in timm, test_every_model.py of vision-models asks a process of its own.
@pytest.mark.parametrize(
    ("package", "own"),
    [
        ("vision_models", True),
        pytest.param("vision_models", False, marks=pytest.mark.slow),
        pytest.param("seq_models", True, marks=pytest.mark.slow),
        pytest.param("seq_models", False, marks=pytest.mark.slow),
    ],
)
def test_importing_registers_models_except_in_the_packages_own_command(package: str, own: bool) -> None:
    argument = f"/bin/{package.replace('_', '-')}" if own else "train.py"
    library = {"seq_models": "transformers", "vision_models": "timm"}[package]
    assert (library in _loaded_by(f"sys.argv = ['{argument}']; import {package}")) != own
