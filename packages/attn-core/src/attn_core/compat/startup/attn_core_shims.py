"""The shims by name, and how they are put where ``import`` finds them and taken away again.

Standard library only, and no import of :mod:`attn_core`: child processes load this file before their first line.
"""

import difflib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

STARTUP = Path(__file__).resolve().parent
SITE = STARTUP.parent / "_site"
VARIABLE = "ATTN_CORE_COMPAT"


@dataclass(frozen=True)
class Shim:
    """A replacement of compiled extensions.

    Attributes:
        folder: the folder of :data:`SITE` with whole packages and their metadata, or None.
        foreign: modules inside packages of other people, and the files of :data:`SITE` that stand for them.
        replaces: what it is, in the user's words.
    """

    folder: str | None
    replaces: str
    foreign: Mapping[str, str] = field(default_factory=dict)

    def packages(self) -> list[str]:
        """Names that its folder makes importable."""
        if self.folder is None:
            return []
        entries = [entry for entry in (SITE / self.folder).iterdir() if not entry.name.startswith("__")]
        return sorted(entry.name.removesuffix(".py") for entry in entries if entry.suffix != ".dist-info")


SHIMS: dict[str, Shim] = {
    "msda": Shim(
        "msda",
        "MultiScaleDeformableAttention, groundingdino._C, dfa3D._ext",
        {"groundingdino._C": "foreign/groundingdino_c.py", "dfa3D._ext": "foreign/dfa3d_ext.py"},
    ),
    "mamba": Shim(
        "mamba",
        "selective_scan_cuda, selective_scan_cuda_oflex, selective_scan_cuda_core, causal_conv1d_cuda, and the "
        "packages mamba_ssm, causal_conv1d, selective_scan",
    ),
    "natten@0.14": Shim("natten-0.14", "natten 0.14: natten2dqkrpb, natten2dav, modules that pad small inputs"),
    "natten@0.15": Shim("natten-0.15", "natten 0.15: na2d_qk_with_bias, na2d_av beside the names of 0.14"),
    "natten@0.17": Shim("natten-0.17", "natten 0.17: na2d_qk, na2d_av, fused na2d (dilation fifth), rel_pos_bias"),
    "natten@0.20": Shim("natten-0.20", "natten 0.20 and later: na2d (stride fifth), attention, merge_attentions"),
    "mmcv_ext": Shim(
        None, "mmcv._ext below mmcv-lite or a mmcv built without ops", {"mmcv._ext": "foreign/mmcv_ext.py"}
    ),
    "flash_attn@2.6": Shim(
        "flash_attn-2.6", "flash_attn up to 2.6, the names of 1.x too; unpad_input returns 4 values"
    ),
    "flash_attn": Shim("flash_attn-2.8", "flash_attn 2.7 and later; unpad_input returns 5 values"),
    "spatial_correlation_sampler": Shim("spatial_correlation_sampler", "spatial_correlation_sampler"),
    "swattention": Shim("swattention", "swattention (TransNeXt, MoH-ViT)"),
}


class InstalledError(RuntimeError):
    """A package that a shim stands for is installed, and nobody asked to hide it."""


def lookup(name: str) -> Shim:
    """The shim of a name such as ``"natten@0.14"``.

    Raises:
        ValueError: no shim has that name; the message lists the nearest, or the versions.
    """
    if name in SHIMS:
        return SHIMS[name]
    package = name.partition("@")[0]
    versions = [known for known in SHIMS if known.partition("@")[0] == package]
    near = versions or difflib.get_close_matches(name, SHIMS, 3, 0.5) or list(SHIMS)
    raise ValueError(f"provide: there is no shim {name!r}; choose from {', '.join(map(repr, near))}")


def installed_at(package: str) -> str | None:
    """Where a real package of that name is found, or is loaded from; None if there is none or it is a shim's."""
    module = sys.modules.get(package)
    if module is not None:
        return None if is_ours(module) else getattr(module, "__file__", None) or "sys.modules"
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    # A folder without __init__.py, such as the C++ sources of natten in a clone, hides no package behind it.
    if spec is None or spec.origin is None or _is_of_site(spec.origin):
        return None
    return spec.origin


def is_ours(module: ModuleType) -> bool:
    """Whether a loaded module is part of a shim."""
    return _is_of_site(getattr(getattr(module, "__spec__", None), "origin", None))


def _is_of_site(origin: str | None) -> bool:
    return origin is not None and os.path.abspath(origin).startswith(str(SITE) + os.sep)


class ForeignFinder:
    """Finds modules that other people's packages lack: ``mmcv._ext``, ``groundingdino._C``, ``dfa3D._ext``."""

    def __init__(self, modules: Mapping[str, str], force: bool, quiet: bool) -> None:
        self.modules = {name: SITE / file for name, file in modules.items()}
        self.force, self.quiet = force, quiet

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The specification of a module that is ours to give."""
        file = self.modules.get(fullname)
        if file is None:
            return None
        if self.force and not self.quiet:
            real = importlib.machinery.PathFinder.find_spec(fullname, path)
            if real is not None:
                self.quiet = True
                _warn_of_shadow({fullname: str(real.origin)})
        return importlib.util.spec_from_file_location(fullname, file)


def _warn_of_shadow(shadowed: Mapping[str, str]) -> None:
    listed = ", ".join(f"{name} ({place})" for name, place in shadowed.items())
    warnings.warn(f"provide: force=True: attn_core's shims hide what is installed: {listed}", UserWarning, stacklevel=4)


class Provided:
    """Shims in place, from the call of :func:`provide` until :meth:`restore` or the end of a ``with`` block."""

    def __init__(self, names: tuple[str, ...], *, force: bool, children: bool = True, quiet: bool = False) -> None:
        shims = {name: lookup(name) for name in names}
        self.names = names
        self._packages = [package for shim in shims.values() for package in shim.packages()]
        twice = sorted({name for name in self._packages if self._packages.count(name) > 1})
        if twice:
            raise ValueError(f"provide: {', '.join(names)} both bring {', '.join(twice)}; choose one")
        self._foreign = {name: file for shim in shims.values() for name, file in shim.foreign.items()}
        places = {package: installed_at(package) for package in self._packages}
        found = {package: place for package, place in places.items() if place is not None}
        if found and not force and not quiet:
            self._refuse(shims, found)
        self._refuse_other_version(shims)
        if found and force and not quiet:
            _warn_of_shadow(found)
        hidden = self._packages if force else [package for package in self._packages if package not in found]
        self._saved = self._take_modules(hidden, self._foreign if force else ())
        self._entries = [str(SITE / shim.folder) for shim in shims.values() if shim.folder is not None]
        self._active = True
        if force:
            sys.path[:0] = self._entries
        else:
            sys.path.extend(self._entries)
        self._finder = ForeignFinder(self._foreign, force, quiet)
        sys.meta_path.insert(0 if force else len(sys.meta_path), self._finder)  # pyright: ignore[reportArgumentType]
        importlib.invalidate_caches()
        mark = "!" if force else ""
        self._environment = inherit(VARIABLE, [name + mark for name in names]) if children else {}

    @staticmethod
    def _refuse(shims: Mapping[str, Shim], found: Mapping[str, str]) -> None:
        """Of a shim whose packages are all installed nothing would be used: the caller expects something else."""
        for name, shim in shims.items():
            packages = shim.packages()
            if packages and all(package in found for package in packages) and not shim.foreign:
                package = packages[0]
                raise InstalledError(
                    f"provide: {package} is installed ({found[package]}) and would be used instead of the shim "
                    f"{name!r}; leave the shim out, or pass force=True (--force) to put it before the installed one"
                )

    @staticmethod
    def _refuse_other_version(shims: Mapping[str, Shim]) -> None:
        wanted = {str(SITE / shim.folder) for shim in shims.values() if shim.folder is not None}
        present = {entry: Path(entry).name.partition("-")[0] for entry in sys.path if _is_of_site(entry)}
        for name, shim in shims.items():
            for entry, package in present.items():
                if shim.folder is not None and package == shim.folder.partition("-")[0] and entry not in wanted:
                    raise ValueError(
                        f"provide: {Path(entry).name} is provided already and {name!r} is another version of it; "
                        "leave the first one (restore()) before"
                    )

    @staticmethod
    def _take_modules(packages: Iterable[str], modules: Iterable[str]) -> dict[str, ModuleType]:
        """Out of sys.modules: what a failed import left behind, or what is to be hidden."""
        tops, single = set(packages), set(modules)
        names = [name for name in sys.modules if name.partition(".")[0] in tops or name in single]
        return {name: sys.modules.pop(name) for name in names if not is_ours(sys.modules[name])}

    def restore(self) -> None:
        """Take the shims out of sys.path, sys.meta_path, sys.modules and the environment of children."""
        if not self._active:
            return
        self._active = False
        for entry in self._entries:
            if entry in sys.path:
                sys.path.remove(entry)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)  # pyright: ignore[reportArgumentType]
        still = {entry for entry in sys.path if _is_of_site(entry)}
        tops = set(self._packages)
        for name, module in list(sys.modules.items()):
            if not (name.partition(".")[0] in tops or name in self._foreign) or not is_ours(module):
                continue
            if any(str(getattr(module.__spec__, "origin", "")).startswith(entry + os.sep) for entry in still):
                continue  # an outer provide brought it
            del sys.modules[name]
            package, _, child = name.rpartition(".")
            parent = sys.modules.get(package)
            if parent is not None and getattr(parent, child, None) is module:
                delattr(parent, child)
        sys.modules.update(self._saved)
        for name, module in self._saved.items():
            package, _, child = name.rpartition(".")
            if package in sys.modules and not hasattr(sys.modules[package], child):
                setattr(sys.modules[package], child, module)
        importlib.invalidate_caches()
        give_back(self._environment)

    def __enter__(self) -> "Provided":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def provide(*names: str, force: bool = False) -> Provided:
    """Make compiled extensions importable that are not installed, over attn_core's operators.

    Takes effect at once, for child processes too (spawned workers, torchrun); ends with the ``with`` block or with
    ``restore()``. Whole packages stand at the end of ``sys.path``, so what is installed comes first; modules inside
    other packages come from a finder behind all others.

    Args:
        names: ``"msda"``, ``"mamba"``, ``"natten@0.14"``, …: the keys of ``attn_core.compat.SHIMS``.
        force: put the shims before what is installed, with one warning that names it.

    Raises:
        ValueError: no shim has that name, or two bring the same package. InstalledError: everything that a shim
            stands for is installed.
    """
    if not names:
        raise ValueError(f"provide: name at least one shim, of {', '.join(map(repr, SHIMS))}")
    return Provided(names, force=force)


def install_from_environment() -> None:
    """In a child process: what its parent provided."""
    root = STARTUP.parents[2]
    listed = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    for force in (False, True):
        names = tuple(name.rstrip("!") for name in listed if name.endswith("!") is force)
        if names:
            Provided(names, force=force, children=False, quiet=True)
    if listed and importlib.util.find_spec("attn_core") is None:
        sys.path.append(str(root))


def inherit(variable: str, items: Iterable[str]) -> dict[str, str | None]:
    """Let child processes know: ``variable`` lists the items, PYTHONPATH begins with the startup folder.

    Returns:
        What both variables held before.
    """
    before = {name: os.environ.get(name) for name in (variable, "PYTHONPATH")}
    known = [item for item in (before[variable] or "").split(",") if item]
    os.environ[variable] = ",".join([*known, *(item for item in items if item not in known)])
    path = (before["PYTHONPATH"] or "").split(os.pathsep) if before["PYTHONPATH"] else []
    if str(STARTUP) not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *path])
    return before


def give_back(environment: Mapping[str, str | None]) -> None:
    """Environment variables as they were."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
