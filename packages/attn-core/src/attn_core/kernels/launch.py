"""How Triton backends start their kernels, and how the ahead-of-time gate listens in.

Every kernel starts through :func:`launch`. Inside :func:`record` nothing starts: the launches are kept, so that running
a backend on meta tensors yields exactly the kernels, signatures and options that it would run on a GPU of that
architecture.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from attn_core.dispatch import interpreting

T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """Shape of a program's tile and how the compiler schedules it.

    ``repeats``: several of its warps compute one product alike, for want of a tile that neither does so nor spills.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    repeats: bool = False


@dataclass(frozen=True)
class Launch:
    """One recorded kernel start."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    repeats: bool


@dataclass
class _Recorder:
    architecture: str
    launches: list[Launch] = field(default_factory=list)


_recorder: _Recorder | None = None


@contextmanager
def record(architecture: str) -> Iterator[list[Launch]]:
    """Collect launches instead of performing them, configured for ``architecture`` (``"sm_90"``, ``"gfx942"``…)."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(architecture)
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def launch(kernel: Any, programs: int, device: torch.device, tile: Tile, *args: Any, **constants: Any) -> None:
    """Start ``kernel`` on a one-dimensional grid; a grid of 0 programs starts nothing."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, args, constants, tile.warps, tile.stages, tile.repeats))
        return
    if programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](
            *args,
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            # Named because the default changes in Triton 3.10, of which 3.9 warns.
            enable_fp_fusion=True,
        )


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, …: the key of configuration tables."""
    if _recorder is not None:
        return _recorder.architecture
    if device.type != "cuda":
        return "interpreter"
    return _device_architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def product_options(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of ``tl.dot``: operands are cast up where the interpreter would multiply bit patterns.

    float32 operands are multiplied as float32 unless torch was told that less will do.
    """
    return {"UPCAST": interpreting(), "PRECISION": float32_precision() if dtype == torch.float32 else "ieee"}


def float32_precision() -> str:
    """Precision of ``tl.dot`` that torch's settings allow for float32, the older of them or the newer."""
    try:
        return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch refuses the older question once the newer setting says something that it cannot
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Architectures without warp-group products: what a table lists for sm_80 fits them better than what it lists for sm_90.
OLDER = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
# Shared memory of a block there: 99 KB (consumer GPUs) or 64 KB (AMD), against 163 KB on sm_80 and 227 KB on sm_90.
SMALL_MEMORY = ("sm_86", "sm_89", "sm_120", "sm_121")


def at_width(table: Mapping[int, T], width: int) -> T:
    """Entry of the smallest bucket that holds ``width``."""
    return next(entry for bucket, entry in sorted(table.items()) if width <= bucket)


def for_small_memory(tile: Tile, width: int, dtype: torch.dtype, arch: str) -> Tile:
    """A smaller tile where blocks have little shared memory and heads are wide; ``tile`` itself elsewhere."""
    amd = not arch.startswith("sm_")
    if not amd and arch not in SMALL_MEMORY:
        return tile
    size = width * dtype.itemsize * (2 if amd else 1)
    stages = 1 if amd or size > 256 else tile.stages
    if size <= 256:
        return Tile(min(tile.rows, 64), min(tile.columns, 64), tile.warps, stages, tile.repeats)
    return Tile(min(tile.rows, 32), min(tile.columns, 32), min(tile.warps, 4), stages, tile.repeats)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is not below ``size`` nor below ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself when its last dimension is contiguous, else one copy: kernels take every other stride as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides with 0 along dimensions of size 1, so that every index reads the one element there is."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
