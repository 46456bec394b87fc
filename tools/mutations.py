"""Small mutations of a family's files, each of which that family's tests must notice.

``python tools/mutations.py BiFormer`` drops residuals, activations, norms, scales and detachments, swaps axes, signs
and orders, sums for means and changes an eps, one at a time, in the files that hold the family's entries and in the
layers they import, and runs on each mutant the tests named on its card and those that mirror the changed file; on what
these miss, the contracts of all models that stand beside them (``test_every_*.py``). The list goes to
``tests/mutations.json``; reasons written there beside a survivor are kept. A mutant that cannot be imported is no
evidence and is not counted; one that raises while the tests run is killed, but counted apart from those whose numbers
gave them away (``raised``).

The files are not touched: a mutant is a process of its own, in which an import hook serves the changed source.
"""

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests/mutations.json"
PACKAGES = ("detection", "medical_seg", "seq_models", "vision_models", "vlm_tools")
LIMIT = 600  # seconds for the tests of one mutant
PYTEST = (
    *("-n0", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"),
    *("-m", "not slow and not compile and not gpu and not parity and not browser"),
)
UNUSABLE = 99  # exit code of a mutant that cannot be imported; pytest's own end at 5
ACTIVATIONS = re.compile(
    r"(?i)^(gelu|p?relu|relu6|silu|swish|hardswish|sigmoid|(log_)?softmax|tanh|elu|softplus|exp|normalize)$"
)
NORMS = re.compile(r"(?i)norm|^bn\d?$|^ln_?\w*$")
SCALES = re.compile(r"(?i)scale|gamma|temperature|^ls\d?$|alpha|decay")


@dataclass(frozen=True)
class Mutation:
    """One change: where, of what kind, and the text before and after."""

    module: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    def key(self) -> dict[str, object]:
        """What names the mutation in the committed list, whatever line it stands in."""
        return {"module": self.module, "kind": self.kind, "before": self.before, "after": self.after}


@dataclass(frozen=True)
class Family:
    """A published system: modules that make it up, and the test files on its cards."""

    name: str
    package: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


def candidates(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Kinds of mutation of one expression, each with what stands in its place."""
    match node:
        case ast.BinOp(op=ast.Add(), left=left, right=right) if isinstance(right, ast.Call | ast.BinOp):
            yield "residual", right
            yield "residual", left
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            for kept, dropped in ((left, right), (right, left)):
                if SCALES.search(_name(dropped)) or isinstance(getattr(dropped, "op", None), ast.Pow):
                    yield "scale", kept
        case ast.BinOp(op=ast.Sub(), left=left, right=right):
            yield "sign", ast.BinOp(left, ast.Add(), right)
        case ast.BinOp(op=ast.Pow(), left=left, right=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=0.5))):
            yield "scale", ast.BinOp(left, ast.Pow(), ast.UnaryOp(ast.USub(), ast.Constant(0.25)))
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if ACTIVATIONS.match(attr) and _computed(value):
            yield "activation", value
        case ast.Call(func=func, args=[first, *_]) if ACTIVATIONS.match(_name(func)):
            yield "activation", first
        case ast.Call(func=ast.Attribute(value=ast.Name(id="nn"), attr=attr)) if ACTIVATIONS.match(attr):
            yield "activation", _identity()
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=attr), args=[first, *_]):
            if NORMS.search(attr):
                yield "norm", first
            elif SCALES.search(attr) or attr.startswith("act"):
                yield "activation", first
        case ast.Call(func=ast.Attribute(attr="addcmul"), args=[residual, *_, last]):
            yield "residual", last
            yield "scale", residual
        case ast.Call(func=ast.Attribute(attr="cat"), args=[ast.List(elts=[_, _, *_] as parts), *rest]):
            yield "order", ast.Call(node.func, [ast.List(parts[::-1], ast.Load()), *rest], node.keywords)
        case ast.Call(func=ast.Attribute(value=value, attr="mean") as called) if _computed(value):
            yield "mean", ast.Call(ast.Attribute(called.value, "sum", ast.Load()), node.args, node.keywords)
        case ast.Call(func=ast.Attribute(value=value, attr="detach")):
            yield "gradient", value
        case ast.Call(func=ast.Attribute(attr="permute"), args=[_, _, _, *_] as args):
            changed = copy.copy(node)
            changed.args = [*args[:-2], args[-1], args[-2]]
            yield "axes", changed
        case ast.Call(func=ast.Attribute(value=value, attr="transpose" | "mT")):
            yield "axes", value
        case ast.Attribute(value=value, attr="mT"):
            yield "axes", value
        case ast.keyword(arg="activation", value=ast.Constant(value=str())):
            yield "activation", ast.keyword("activation", ast.Constant(None))
        case ast.keyword(arg="scale", value=value) if not isinstance(value, ast.Constant) or value.value is not None:
            yield "scale", ast.keyword("scale", ast.BinOp(value, ast.Mult(), ast.Constant(2.0)))
        case ast.keyword(arg="eps", value=ast.Constant(value=float(eps))):
            yield "eps", ast.keyword("eps", ast.Constant(eps * 1e4))
        case ast.keyword(arg="dim", value=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1))):
            yield "axes", ast.keyword("dim", ast.UnaryOp(ast.USub(), ast.Constant(2)))
        case ast.keyword(arg="causal", value=value):
            yield "mask", ast.keyword("causal", ast.Constant(None))


def _computed(node: ast.AST) -> bool:
    """Whether an expression is a tensor rather than a module such as ``F``: ``x.softmax(-1)``, not ``F.relu(x)``."""
    return not isinstance(node, ast.Name) or node.id not in ("F", "nn", "torch", "math", "np")


def _name(node: ast.AST) -> str:
    match node:
        case ast.Attribute(attr=attr):
            return attr
        case ast.Name(id=name):
            return name
        case ast.Call(func=func):
            return _name(func)
    return ""


def _identity() -> ast.AST:
    return ast.parse("nn.Identity()", mode="eval").body


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, by: ast.AST) -> None:
        self.target, self.by = target, by

    def visit(self, node: ast.AST) -> ast.AST:
        return self.by if node is self.target else self.generic_visit(node)


def mutations(module: str, source: str) -> list[Mutation]:
    """Every mutation of the classes and functions of a file that compiles; code that runs nowhere is left out."""
    found = []
    for place in [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]:
        skipped = {id(inner) for n in ast.walk(place) if _aside(n) for inner in ast.walk(n)}
        for node in ast.walk(place):
            if id(node) in skipped:
                continue
            for kind, by in candidates(node):
                tree = ast.parse(source)
                twin = _twin(tree, node)
                changed = ast.fix_missing_locations(_Replace(twin, by).visit(tree))
                before, after = ast.unparse(node), ast.unparse(by)
                line = getattr(node, "lineno", place.lineno)
                found.append(Mutation(module, line, kind, before, after, ast.unparse(changed)))
    return found


def _aside(node: ast.AST) -> bool:
    """Annotations, error messages, printing, weights' names: no part of what a network computes."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.arg | ast.Assert):
        return True
    names = ("__repr__", "extra_repr", "group_matcher", "no_weight_decay", "load_official", "from_official")
    return isinstance(node, ast.FunctionDef) and (node.name in names or "init_weights" in node.name)


def _twin(tree: ast.AST, node: ast.AST) -> ast.AST:
    """The node of a second parse of the same text that stands where ``node`` does."""
    return next(other for other in ast.walk(tree) if _place(other) == _place(node))


def _place(node: ast.AST) -> tuple[object, ...]:
    corners = (getattr(node, name, None) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset"))
    return (type(node), *corners)


def chosen(pool: Sequence[Mutation], count: int, seed: int) -> list[Mutation]:
    """A seeded choice in which every kind and every file comes in turn."""
    order = random.Random(seed)
    groups: dict[tuple[str, str], list[Mutation]] = {}
    for mutation in order.sample(pool, len(pool)):
        groups.setdefault((mutation.kind, mutation.module), []).append(mutation)
    picked: list[Mutation] = []
    while len(picked) < count and any(groups.values()):
        for group in groups.values():
            if group and len(picked) < count:
                picked.append(group.pop())
    return picked


class _Mutant(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Serves one module from changed source, under its own file's name."""

    def __init__(self, module: str, file: str, source: str) -> None:
        self.module, self.file, self.source = module, file, source

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:  # noqa: ARG002  importlib's signature
        if name != self.module:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=self.file)
        assert spec is not None
        spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> str:  # noqa: ARG002  importlib's signature
        return self.source


class _First:
    """A plugin of pytest's: one thread; tests that killed earlier mutants first, then those of whole networks."""

    def __init__(self, killers: Sequence[str]) -> None:
        self.killers = killers

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import torch

        torch.set_num_threads(1)  # two wait for each other where a mutant is one process of many
        rank = {name: place for place, name in enumerate(self.killers)}
        items.sort(key=lambda item: (rank.get(item.nodeid, len(rank)), "plain" not in item.name))


def _in_a_process(mutation: Mutation | None, tests: Sequence[str], killers: Sequence[str] = ()) -> tuple[int, str]:
    """pytest's exit code on a mutant, in a forked process, and the first failure it named; -1 where time ran out."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ["COLUMNS"] = "1000"  # or pytest shortens the failure that is read below
            if mutation is not None and not _imported(mutation):
                os._exit(UNUSABLE)
            import pytest

            code = pytest.main([*PYTEST, *tests], plugins=[_First(killers)])
            sys.stdout.flush()
            os._exit(int(code))
        start = time.monotonic()
        while time.monotonic() - start < LIMIT:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                log.seek(0)
                lines = [line for line in log.read().splitlines() if line.strip()]
                failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
                code = os.waitstatus_to_exitcode(status)
                return (code if code >= 0 else 1), [*lines[-1:], *failed][-1] if lines else ""
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -1, "time ran out"


def _imported(mutation: Mutation) -> bool:
    """Import a mutant; whether that went well."""
    assert mutation.module not in sys.modules, f"{mutation.module} was imported before it was changed"
    mutant = _Mutant(mutation.module, str(_file(mutation.module)), mutation.source)
    sys.meta_path.insert(0, mutant)
    try:
        loaded = importlib.import_module(mutation.module)
    except Exception:
        return False
    assert loaded.__loader__ is mutant, f"{mutation.module} came from elsewhere"
    return True


def _mirrors(module: str) -> list[str]:
    """The test file that stands where a module does."""
    top, _, inner = module.partition(".")
    folder, _, name = inner.rpartition(".")
    tests = Path("packages", top.replace("_", "-"), "tests", *folder.split("."))
    return [str(tests / file.name) for file in sorted((ROOT / tests).glob(f"test_{name}.py"))]


def _contracts(family: Family) -> list[str]:
    """Tests of all models that stand beside those of a family."""
    beside = [file for test in family.tests for file in (ROOT / test).parent.glob("test_every_*.py")]
    return sorted({str(file.relative_to(ROOT)) for file in beside} - set(family.tests))


def _file(module: str) -> Path:
    """Where a module of ours lies; found without importing what stands above it."""
    path = next(ROOT.glob(f"packages/*/src/{module.partition('.')[0]}")).parent / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def families() -> dict[str, Family]:
    """Every published system of the catalogues, read in a process of its own: this one must not import them."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as out, contextlib.redirect_stdout(io.StringIO()):
            json.dump(_read_catalogs(), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as text:
        rows = json.load(text)
    os.wait()
    return {
        name: Family(name, row["package"], tuple(row["modules"]), tuple(row["tests"])) for name, row in rows.items()
    }


def _read_catalogs() -> dict[str, dict[str, object]]:
    import pkgutil

    from attn_core.catalog import Catalog

    found: dict[str, dict[str, object]] = {}
    for package in PACKAGES:
        faces = vars(importlib.import_module(f"{package}.models")).values()
        folders = {face.folder for face in faces if isinstance(face, Catalog)}
        paths = [(importlib.import_module(folder).__path__, f"{folder}.") for folder in sorted(folders)]
        for info in [info for path, prefix in paths for info in pkgutil.walk_packages(path, prefix)]:
            for entry in getattr(importlib.import_module(info.name), "ENTRIES", ()):
                if entry.name.startswith("test_"):
                    continue
                row = found.setdefault(
                    entry.card.family, {"package": package.replace("_", "-"), "modules": [], "tests": []}
                )
                test = f"packages/{row['package']}/tests/{entry.card.test}"
                for key, values in (("modules", _with_layers(info.name, package)), ("tests", [test])):
                    row[key] = [*row[key], *(v for v in values if v not in row[key])]  # type: ignore[misc,operator]
    return found


def _with_layers(module: str, package: str) -> list[str]:
    """An entry's file and what it imports of the package's models, layers and methods, and of the core's modules.

    A module that is imported through its folder's face (``from attn_core.nn import Linear``) is not among them.
    """
    rooms = ("attn_core.nn.", *(f"{package}.{room}." for room in ("layers", "models", "methods")))
    names = [module]
    for importer in names:  # which grows while it is walked
        for node in ast.walk(ast.parse(_file(importer).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), importer.rpartition(".")[0])
            for name in (base, *(f"{base}.{alias.name}" for alias in node.names)):
                new = name.startswith(rooms) and name not in names
                if new and _file(name).name != "__init__.py" and _file(name).exists():
                    names.append(name)
    return names


class Judge:
    """Runs tests on mutants, and once on the unchanged source each test that killed one: it must pass there."""

    def __init__(self) -> None:
        self.killers: list[str] = []  # the last one first
        self.passing: set[str] = set()
        self.known: dict[tuple[str, ...], tuple[int, str]] = {}  # families share files and tests

    def verdict(self, mutation: Mutation, tests: Sequence[str]) -> tuple[int, str]:
        """pytest's exit code, and the failure."""
        key = (mutation.module, mutation.source, *tests)
        if key not in self.known:
            _, line = self.known[key] = _in_a_process(mutation, tests, self.killers)
            if line.startswith(("FAILED ", "ERROR ")):
                self._remember(line)
        return self.known[key]

    def _remember(self, line: str) -> None:
        killer = re.sub(r"^(FAILED|ERROR) ", "", line).partition(" - ")[0]
        if killer not in self.passing:
            code, found = _in_a_process(None, [killer])
            if code != 0:
                raise SystemExit(f"mutations: a test fails without a mutation: {line}: {found}")
            self.passing.add(killer)
        self.killers = [killer, *(name for name in self.killers if name != killer)]


def examine(family: Family, count: int, seed: int, judge: Judge) -> dict[str, object]:
    """Mutate a family ``count`` times; prints a line a mutant."""
    pool = []
    for module in family.modules:
        pool += mutations(module, _file(module).read_text(encoding="utf-8"))
    tried, raised, unusable, survivors = 0, 0, 0, []
    for mutation in chosen(pool, len(pool), seed):
        if tried == count:
            break
        start = time.monotonic()
        code, line = judge.verdict(mutation, list(dict.fromkeys([*_mirrors(mutation.module), *family.tests])))
        if code == 0 and (contracts := _contracts(family)):
            code, line = judge.verdict(mutation, contracts)
        verdict = {0: "survived", UNUSABLE: "cannot be imported"}.get(code, "killed")
        where, change = f"{mutation.module}:{mutation.line}", f"{mutation.before} → {mutation.after}"
        seconds = time.monotonic() - start
        print(f"{family.name}: {verdict}: {where} {mutation.kind}: {change} [{seconds:.0f} s; {line}]", flush=True)
        if code == UNUSABLE:
            unusable += 1
            continue
        tried += 1
        if code == 0:
            survivors.append(mutation.key())
        elif not re.search(r" - (AssertionError|assert |Failed: )", line):
            raised += 1
    return {
        "mutations": tried,
        "killed": tried - len(survivors),
        "raised": raised,
        "unusable": unusable,
        "survivors": survivors,
    }


def main() -> int:
    """Mutate, run the tests, print and write the list; 1 if a family is below its share, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names of published systems, as on their cards")
    parser.add_argument("--all", action="store_true", help="every family; writes the list")
    parser.add_argument("--count", type=int, default=12, help="mutations of each family")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    for library in ("torch", "timm", "transformers", "torchvision", "pytest", "mmengine.registry", "attn_core.engine"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)  # once, before mutants are forked
    known = families()
    names = sorted(known) if arguments.all else arguments.families
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown family {unknown[0]!r}; there are {', '.join(sorted(known))}")
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    unexplained, judge = 0, Judge()
    for name in names:
        row = examine(known[name], arguments.count, arguments.seed, judge)
        reasons = {json.dumps({k: v for k, v in s.items() if k != "reason"}, sort_keys=True): s.get("reason")
                   for s in kept.get(name, {}).get("survivors", [])}  # fmt: skip
        for survivor in row["survivors"]:  # type: ignore[attr-defined]
            reason = reasons.get(json.dumps(survivor, sort_keys=True))
            unexplained += reason is None
            if reason:
                survivor["reason"] = reason
        kept[name] = row
        RESULTS.write_text(
            json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        print(f"{name}: {row['killed']} of {row['mutations']} killed", flush=True)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
