"""The arrows of the house: which file may import which, read from the sources of all packages."""

import ast
import functools
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {folder.name: folder for folder in sorted(ROOT.glob("packages/*/src/*")) if (folder / "__init__.py").exists()}
TASK_PACKAGES = sorted(SOURCES.keys() - {"attn_core"})
# Rooms of every task package, from the bottom up: a file imports from rooms at or below its own.
ORDER = {"data": 0, "layers": 0, "losses": 0, "matchers": 0, "metrics": 0, "models": 1, "pictures": 2, "tasks": 2,
         "bench": 3, "commands": 4, "cli": 5, "__main__": 6}  # fmt: skip


def _modules(package: str) -> dict[str, Path]:
    """Import name → file."""
    root = SOURCES[package]
    found = {}
    for file in root.rglob("*.py"):
        parts = [package, *file.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def _imports(module: str, file: Path) -> tuple[str, ...]:
    """What a file names in its import statements, wherever they stand; type checkers' own imports aside."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    checking = [n for n in blocks if isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"]
    aside = {id(inner) for block in checking for inner in ast.walk(block)}
    found: list[str] = []
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in aside:
            continue
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found += (f"{base}.{alias.name}" for alias in node.names)
    return tuple(found)


def _edges(package: str) -> dict[str, set[str]]:
    """Module → modules of the same package that it imports; a name from a module counts as that module."""
    modules = _modules(package)
    edges: dict[str, set[str]] = {}
    for module, file in modules.items():
        for name in _imports(module, file):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                edges.setdefault(module, set()).add(target)
    return edges


def _circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, or none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(edges.get(node, ())):
            if circle := visit(other, [*path, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(edges) if (circle := visit(node, []))), [])


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("package", SOURCES)
def test_no_file_imports_in_a_circle(package: str) -> None:
    # A folder's face gathers what stands in it; its files do not ask the face.
    assert _circle(_edges(package)) == []


@pytest.mark.parametrize("package", SOURCES)
def test_no_room_imports_in_a_circle(package: str) -> None:
    edges: dict[str, set[str]] = {}
    for module, targets in _edges(package).items():
        for target in targets:
            if _room(module) and _room(target) and _room(module) != _room(target):
                edges.setdefault(_room(module), set()).add(_room(target))
    assert _circle(edges) == []


@pytest.mark.parametrize("package", TASK_PACKAGES)
def test_arrows_point_down(package: str) -> None:
    up = [
        f"{module} imports {target}"
        for module, targets in _edges(package).items()
        for target in targets
        if ORDER.get(_room(target), 0) > ORDER.get(_room(module), 9)
    ]
    assert up == []


@pytest.mark.parametrize("package", SOURCES)
def test_mmengine_is_imported_in_the_engine_alone(package: str) -> None:
    found = [
        module
        for module, file in _modules(package).items()
        if not module.startswith("attn_core.engine")
        and any(name.partition(".")[0] == "mmengine" for name in _imports(module, file))
    ]
    assert found == []


@pytest.mark.parametrize("package", SOURCES)
def test_packages_import_the_core_and_each_other_only_downwards(package: str) -> None:
    allowed = {"attn_core": set(), "detection": {"attn_core", "vision_models"}}.get(package, {"attn_core"}) | {package}
    others = SOURCES.keys() - allowed
    found = [
        f"{module} imports {name}"
        for module, file in _modules(package).items()
        for name in _imports(module, file)
        if name.partition(".")[0] in others
    ]
    assert found == []


@pytest.mark.parametrize("package", TASK_PACKAGES)
def test_the_command_line_is_short(package: str) -> None:
    lines = (SOURCES[package] / "cli.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40, f"{package}.cli has {len(lines)} lines; verbs belong into commands/"
