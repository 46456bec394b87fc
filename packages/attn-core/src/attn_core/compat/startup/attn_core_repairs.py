"""Repairs of what else stops old code: names that numpy, torch and others have removed since. Opt-in, by name.

Standard library only, as ``attn_core_shims``: a repair touches its module when that is imported, not before.
"""

import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

try:
    from .attn_core_shims import SITE, ForeignFinder, give_back, inherit, is_ours
except ImportError:  # in a child process this folder is on the path, and no package
    from attn_core_shims import (  # pyright: ignore[reportMissingImports]
        SITE,
        ForeignFinder,
        give_back,
        inherit,
        is_ours,
    )

VARIABLE = "ATTN_CORE_LEGACY"
Undo = Callable[[], None]


@dataclass(frozen=True)
class Repair:
    """One repair.

    Attributes:
        restores: what it brings back, in the user's words.
        modules: names → what is done to each when it has been imported; the result undoes it.
        folder: a folder of whole packages for the end of sys.path.
        foreign: modules inside other packages, by file.
    """

    restores: str
    modules: dict[str, Callable[[ModuleType], Undo]]
    folder: str | None = None
    foreign: dict[str, str] | None = None


def _set_missing(module: Any, values: dict[str, Any]) -> Undo:
    """Set the attributes that a module has not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        added = [name for name in values if not hasattr(module, name)]
    for name in added:
        setattr(module, name, values[name])

    def undo() -> None:
        for name in added:
            vars(module).pop(name, None)

    return undo


def _numpy(module: ModuleType) -> Undo:
    names = {"float": float, "int": int, "bool": bool, "object": object, "str": str, "complex": complex}
    return _set_missing(module, {**names, "long": int, "unicode": str})


def _torchvision_misc(module: ModuleType) -> Undo:
    class NewEmptyTensorOp:
        """A tensor of another shape, uninitialized; all its uses are of shapes without numbers."""

        @staticmethod
        def apply(x: Any, new_shape: Any) -> Any:
            return x.new_empty(new_shape)

    def output_size(dim: int, x: Any, size: Any, scale_factor: Any) -> list[int]:
        """Sizes of what ``interpolate`` gives for ``size`` or ``scale_factor``."""
        if (size is None) == (scale_factor is None):
            raise ValueError("_output_size: exactly one of size and scale_factor must be given")
        given = scale_factor if size is None else size
        each = list(given) if isinstance(given, (tuple, list)) else [given] * dim
        if size is not None:
            return [int(value) for value in each]
        return [int(x.size(axis + 2) * each[axis]) for axis in range(dim)]

    return _set_missing(module, {"_NewEmptyTensorOp": NewEmptyTensorOp, "_output_size": output_size})


def _torchvision_ops(module: ModuleType) -> Undo:
    def new_empty_tensor(x: Any, shape: Any) -> Any:
        return x.new_empty(shape)

    return _set_missing(module, {"_new_empty_tensor": new_empty_tensor})


def _transformers_generation(module: ModuleType) -> Undo:
    utils: Any = importlib.import_module("transformers.generation.utils")
    decoder, encoder = utils.GenerateDecoderOnlyOutput, utils.GenerateEncoderDecoderOutput
    values: dict[str, Any] = {}
    for kind in ("GreedySearch", "Sample", "ContrastiveSearch"):
        values |= {f"{kind}DecoderOnlyOutput": decoder, f"{kind}EncoderDecoderOutput": encoder}
    for kind in ("BeamSearch", "BeamSample"):
        values |= {
            f"{kind}DecoderOnlyOutput": utils.GenerateBeamDecoderOnlyOutput,
            f"{kind}EncoderDecoderOutput": utils.GenerateBeamEncoderDecoderOutput,
        }
    return _set_missing(module, values)


def _torch_cuda(module: Any) -> Undo:
    real = module.device

    class Device(real):  # type: ignore[misc, valid-type]
        """``torch.cuda.device`` that does nothing for a CPU, where the original raises."""

        def __init__(self, device: Any) -> None:
            kind = getattr(device, "type", device)
            self._on_cpu = isinstance(kind, str) and kind.partition(":")[0] == "cpu"
            if not self._on_cpu:
                super().__init__(device)

        def __enter__(self) -> None:
            if not self._on_cpu:
                super().__enter__()

        def __exit__(self, *exception: Any) -> Any:
            return None if self._on_cpu else super().__exit__(*exception)

    Device.__name__, Device.__qualname__ = real.__name__, real.__qualname__
    module.device = Device

    def undo() -> None:
        module.device = real

    return undo


def _cuda_calls(module: Any) -> Undo:
    """``.cuda()`` stays where it is, if there is no GPU."""
    if module.cuda.is_available():
        return lambda: None
    owners = (module.Tensor, module.nn.Module)
    before = [owner.cuda for owner in owners]

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    for owner in owners:
        owner.cuda = stay

    def undo() -> None:
        for owner, method in zip(owners, before, strict=True):
            owner.cuda = method

    return undo


REPAIRS: dict[str, Repair] = {
    "pkg_resources": Repair(
        "pkg_resources: get_distribution, DistributionNotFound, parse_version, … (gone with setuptools 82)",
        {},
        folder="pkg_resources",
    ),
    "numpy": Repair("np.float, np.int, np.bool, np.object, np.str, np.complex, np.long", {"numpy": _numpy}),
    "torchvision": Repair(
        "torchvision.ops.misc._NewEmptyTensorOp and _output_size, torchvision.ops._new_empty_tensor",
        {"torchvision.ops.misc": _torchvision_misc, "torchvision.ops": _torchvision_ops},
    ),
    "transformers": Repair(
        "GreedySearchDecoderOnlyOutput, SampleDecoderOnlyOutput and their like in transformers.generation",
        {
            "transformers.generation": _transformers_generation,
            "transformers.generation.utils": _transformers_generation,
        },
    ),
    "torch._six": Repair("torch._six", {}, foreign={"torch._six": "foreign/torch_six.py"}),
    "torch.cuda.device": Repair("torch.cuda.device(cpu) does nothing instead of raising", {"torch.cuda": _torch_cuda}),
    "cuda()": Repair("x.cuda() and module.cuda() stay on the CPU where there is no GPU", {"torch": _cuda_calls}),
}


class RepairFinder:
    """Wraps the loader of a module that is to be repaired once it has been executed."""

    def __init__(self, owner: "Legacy", modules: dict[str, Callable[[ModuleType], Undo]]) -> None:
        self.owner, self.modules = owner, modules
        self._searching: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The real specification, with a loader that repairs."""
        if fullname not in self.modules or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = None
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                    break
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Repairing(spec.loader, self.owner, self.modules[fullname])
        return spec


class _Repairing(importlib.abc.Loader):
    def __init__(self, loader: Any, owner: "Legacy", repair: Callable[[ModuleType], Undo]) -> None:
        self._loader, self._owner, self._repair = loader, owner, repair

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        # transformers puts another object in its own place.
        self._owner.repair(sys.modules.get(module.__name__, module), self._repair)


class Legacy:
    """Repairs in place, from the call of :func:`legacy` until :meth:`restore` or the end of a ``with`` block."""

    def __init__(self, names: tuple[str, ...], *, children: bool = True) -> None:
        repairs = [lookup(name) for name in names]
        self.names = names
        self._undo: list[Undo] = []
        self._entries = [str(SITE / repair.folder) for repair in repairs if repair.folder is not None]
        sys.path.extend(self._entries)
        foreign = {name: file for repair in repairs for name, file in (repair.foreign or {}).items()}
        modules = {name: change for repair in repairs for name, change in repair.modules.items()}
        self._foreign = ForeignFinder(foreign, False, True)
        self._finder = RepairFinder(self, modules)
        sys.meta_path.insert(0, self._finder)  # pyright: ignore[reportArgumentType]
        sys.meta_path.append(self._foreign)  # pyright: ignore[reportArgumentType]
        importlib.invalidate_caches()
        for name, change in modules.items():
            if name in sys.modules:
                self.repair(sys.modules[name], change)
        self._environment = inherit(VARIABLE, names) if children else {}
        self._active = True

    def repair(self, module: ModuleType, change: Callable[[ModuleType], Undo]) -> None:
        """Repair one module, and remember how to undo that."""
        self._undo.append(change(module))

    def restore(self) -> None:
        """Take everything back."""
        if not self._active:
            return
        self._active = False
        for undo in reversed(self._undo):
            undo()
        for entry in self._entries:
            if entry in sys.path:
                sys.path.remove(entry)
        for finder in (self._finder, self._foreign):
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)  # pyright: ignore[reportArgumentType]
        for name, module in list(sys.modules.items()):
            if is_ours(module) and (name == "torch._six" or name.partition(".")[0] == "pkg_resources"):
                del sys.modules[name]
                parent = sys.modules.get(name.rpartition(".")[0])
                if parent is not None and getattr(parent, name.rpartition(".")[2], None) is module:
                    delattr(parent, name.rpartition(".")[2])
        importlib.invalidate_caches()
        give_back(self._environment)

    def __enter__(self) -> "Legacy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def lookup(name: str) -> Repair:
    """The repair of a name.

    Raises:
        ValueError: no repair has that name; the message lists the nearest.
    """
    if name in REPAIRS:
        return REPAIRS[name]
    near = difflib.get_close_matches(name, REPAIRS, 2, 0.5) or list(REPAIRS)
    raise ValueError(f"legacy: there is no repair {name!r}; choose from {', '.join(map(repr, near))}")


def legacy(*names: str) -> Legacy:
    """Bring back names that old code needs and today's libraries have removed; nothing that exists is replaced.

    Takes effect at once, for child processes too; ends with the ``with`` block or with ``restore()``.

    Args:
        names: the keys of ``attn_core.compat.REPAIRS``, such as ``"numpy"`` or ``"pkg_resources"``.

    Raises:
        ValueError: no repair has that name.
    """
    if not names:
        raise ValueError(f"legacy: name at least one repair, of {', '.join(map(repr, REPAIRS))}")
    return Legacy(names)


def install_from_environment() -> None:
    """In a child process: the repairs that its parent chose."""
    names = tuple(name for name in os.environ.get(VARIABLE, "").split(",") if name)
    if names:
        Legacy(names, children=False)
