"""Run directories: which one a run takes, who may write to it, and what it says about itself."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attn_core.catalog import did_you_mean
from attn_core.engine.checkpoint import list_checkpoints
from attn_core.engine.errors import ConfigError, EngineError
from attn_core.engine.package import PackageId

try:
    import fcntl
except ImportError:  # Windows has no such locks; two runs in one directory are then the user's to avoid
    fcntl = None

RUNS = Path("runs")
CONFIG = "config.py"
_LOCK = ".lock"


def about_run(directory: Path) -> dict[str, Any]:
    """What ``run.json`` says, entries of a wrong kind left out; empty without the file."""
    try:
        content = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = {"package": str, "recipe": str, "started": str, "commands": list, "data_info": dict}
    about = content if isinstance(content, dict) else {}
    return {key: value for key, value in about.items() if isinstance(value, kinds.get(key, object))}


def require_own(package: PackageId, directory: Path) -> None:
    """Refuse a run of another package.

    Raises:
        EngineError: if ``run.json`` names another one.
    """
    other = about_run(directory).get("package", package.name)
    if other != package.name:
        raise EngineError(f"{directory} is a run of {other}, not of {package.name}; use the command {other}")


def _runs_beside(package: PackageId, directory: Path) -> list[str]:
    """Runs of this package, or of none named, in the folder that the directory would be in."""
    runs = [path.parent for path in directory.parent.glob(f"*/{CONFIG}")]
    return [str(run) for run in runs if about_run(run).get("package", package.name) == package.name]


def require_run(package: PackageId, directory: Path) -> Path:
    """The ``config.py`` of a run of this package.

    Raises:
        EngineError: if the directory is not a run, or one of another package.
    """
    path = directory / CONFIG
    if not path.is_file():
        what = "is not a run directory (no config.py)" if directory.exists() else "does not exist"
        nearest = did_you_mean(str(directory), _runs_beside(package, directory))
        raise EngineError(f"{directory} {what}; runs are the directories that '{package.name} train' writes{nearest}")
    require_own(package, directory)
    return path


def newest_run(package: PackageId) -> Path:
    """The run of this package under ``runs`` that was written to last.

    Raises:
        EngineError: if there is none.
    """
    runs = [path.parent for path in RUNS.glob("*/run.json") if about_run(path.parent).get("package") == package.name]
    runs = [run for run in runs if list_checkpoints(run) or list_checkpoints(run, best=True)]
    if not runs:
        raise EngineError(f"no trained run in {RUNS}/; train one first: {package.name} train")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime if (run / "metrics.jsonl").exists() else 0)


def run_to_resume(package: PackageId, directory: Path | None, recipe: str | None) -> Path:
    """The directory of the run that ``--resume`` means.

    Args:
        package: The task package.
        directory: ``--out``; None means the newest run of the recipe under ``runs``.
        recipe: The recipe named on the command line; None means the package's default, or that of ``directory``.

    Raises:
        EngineError: if there is no such run, or it belongs to another package.
        ConfigError: if it is a run of another recipe.
    """
    if directory is None:
        wanted = Path(recipe or package.default_recipe).stem
        runs = [
            path.parent
            for path in RUNS.glob("*/run.json")
            if about_run(path.parent).get("recipe") == wanted and about_run(path.parent).get("package") == package.name
        ]
        directory = max(runs, key=lambda run: (run / "run.json").stat().st_mtime, default=None)
        if directory is None:
            raise EngineError(f"train: no run of {wanted} under {RUNS}/ to resume; leave --resume out to start one")
    if not (directory / CONFIG).is_file():
        nearest = did_you_mean(str(directory), _runs_beside(package, directory))
        raise EngineError(f"train: {directory} holds no run to resume{nearest}")
    require_own(package, directory)
    stored = about_run(directory).get("recipe")
    if recipe is not None and stored and Path(recipe).stem != stored:
        raise ConfigError(f"train: {directory} is a run of {stored!r}, not of {recipe!r}; leave the recipe out")
    return directory


def free_directory(wanted: Path | None, recipe: str) -> Path:
    """The directory of a new run: ``--out`` if it is free, else ``runs/<recipe>``, numbered if that is taken.

    Raises:
        ConfigError: if ``--out`` is a file.
        EngineError: if it holds a run, or anything else.
    """
    if wanted is None:
        candidate, number = RUNS / recipe, 1
        while candidate.exists() and any(candidate.iterdir()):
            number += 1
            candidate = RUNS / f"{recipe}_{number}"
        return candidate
    if wanted.exists() and not wanted.is_dir():
        raise ConfigError(f"train: --out {wanted} is a file")
    if (wanted / CONFIG).is_file():
        newest = next(iter(list_checkpoints(wanted)), "no checkpoint")
        raise EngineError(
            f"train: {wanted} holds a run already ({newest}); continue it with --resume or choose another --out"
        )
    if wanted.is_dir() and any(path.name != _LOCK for path in wanted.iterdir()):
        raise EngineError(f"train: {wanted} is not empty and holds no run; choose another --out")
    return wanted


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Make a run directory and keep other processes from training in it.

    The lock belongs to this process and ends with it, however it ends, so that a killed run leaves none behind. A new
    run that fails before its first checkpoint or measurement leaves nothing behind.

    Raises:
        EngineError: if another process trains there, or the directory cannot be made.
    """
    fresh = not (directory / CONFIG).exists()
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"train: --out {directory} cannot be made: {error.strerror}") from None
    lock = _lock(directory)
    try:
        yield
    except BaseException:
        if fresh and not _has_results(directory):
            _empty(directory, made)
        raise
    finally:
        if lock is not None:
            (directory / _LOCK).unlink(missing_ok=True)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """An open, locked file; None where the file system has no locks."""
    if fcntl is None:
        return None
    path = directory / _LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not flock: loader workers would inherit it, and outlive a process that is killed by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise EngineError(f"train: {directory} is in use by {holder}; wait, or choose another --out") from None
        except OSError:
            os.close(file)
            return None
        try:
            same = os.path.samestat(os.fstat(file), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        os.close(file)  # whoever held the lock has removed the file in between


def _has_results(directory: Path) -> bool:
    metrics = directory / "metrics.jsonl"
    return bool(list_checkpoints(directory)) or (metrics.exists() and metrics.stat().st_size > 0)


def _empty(directory: Path, made: list[Path]) -> None:
    """Remove what a failed start has written, and the folders that it has made."""
    for path in list(directory.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()
