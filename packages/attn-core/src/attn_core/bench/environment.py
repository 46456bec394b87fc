"""Where a benchmark ran: versions, processor, commit. No paths, no host names."""

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment(device: str, threads: int) -> dict[str, Any]:
    """The ``env`` of a result file."""
    on_gpu = device.startswith("cuda")
    commit, dirty = _commit()
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "attn_core": _version("attn-core"),
        "python": platform.python_version(),
        "driver": _driver() if on_gpu else None,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cpu": cpu_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    printed = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return printed.splitlines()[0] if printed else None


def _commit() -> tuple[str | None, bool | None]:
    """Commit of this checkout and whether tracked files differ from it; None from an installed wheel."""
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if _run(*git, "ls-files", "--error-unmatch", here.name) is None:
        return None, None
    return _run(*git, "rev-parse", "--short=12", "HEAD"), bool(_run(*git, "status", "--porcelain", "-uno"))
