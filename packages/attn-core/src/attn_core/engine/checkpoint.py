"""Checkpoints that cannot be half-written, are never executed, and say what is wrong with them.

A checkpoint ``step_1200`` is three files in the run directory:

    step_1200.safetensors   the weights (of the moving average, if there is one)
    step_1200.state.pt      optimizer, schedulers, position, ...: plain data, read by torch.load(weights_only=True)
    step_1200.json          manifest: sizes and sha256 of the other two, its own sha256, step, epoch, metrics, versions

Every file is written under a temporary name, flushed to disk and renamed; the manifest comes last and makes the
checkpoint exist. ``best_step_1200`` has no state. The hashes matter: either format loads a flipped bit in silence.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from attn_core.engine.errors import CheckpointError

_NAME = re.compile(r"(?:best_)?step_(\d+)")
_SHOWN_KEYS = 5


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found intact.

    Attributes:
        directory: The run directory.
        name: ``step_1200`` or ``best_step_1200``.
        manifest: Content of the manifest.
    """

    directory: Path
    name: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Training steps that the weights have seen."""
        return int(self.manifest["step"])

    @property
    def weights_path(self) -> Path:
        """The safetensors file."""
        return self.directory / f"{self.name}.safetensors"

    def read_weights(self) -> dict[str, Tensor]:
        """The weights, on the CPU."""
        return read_weights(self.weights_path)

    def read_state(self) -> dict[str, Any]:
        """Everything but the weights, on the CPU."""
        return read_plain(self.directory / f"{self.name}.state.pt")


def write_checkpoint(
    directory: Path,
    name: str,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any] | None,
    about: Mapping[str, Any],
) -> Checkpoint:
    """Write a checkpoint; it either exists afterwards or, after a crash at any point, does not.

    Args:
        directory: The run directory.
        name: ``step_<n>`` or ``best_step_<n>``.
        weights: Tensors by name.
        state: Plain data and tensors (see `to_plain`), or None for weights alone.
        about: ``step`` and what else the manifest shall say; must be JSON.

    Raises:
        TypeError: if the state holds anything but plain data; nothing is written then.
    """
    plain = None if state is None else to_plain(state)
    (directory / f"{name}.json").unlink(missing_ok=True)  # from here on an older checkpoint of this name is gone
    files = {f"{name}.safetensors": lambda path: save_file(_separate(weights), path)}
    if plain is not None:
        files[f"{name}.state.pt"] = lambda path: torch.save(plain, path)
    sizes = {file: _write_atomically(directory / file, write) for file, write in files.items()}
    manifest = {"format": 1, **about, "files": sizes}
    manifest["sha256"] = _manifest_hash(manifest)
    text = json.dumps(manifest, indent=1)
    _write_atomically(directory / f"{name}.json", lambda path: path.write_text(text + "\n"))
    return Checkpoint(directory, name, manifest)


def open_checkpoint(directory: Path, name: str) -> Checkpoint:
    """Check sizes and hashes of a checkpoint.

    Raises:
        CheckpointError: if a file is missing, truncated or altered.
    """
    path = directory / f"{name}.json"
    try:
        manifest = json.loads(path.read_text())
        intact = (
            manifest["sha256"] == _manifest_hash(manifest) and f"step_{manifest['step']}" == name[-len(_base(name)) :]
        )
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"load_checkpoint: {path} cannot be read as a manifest ({type(error).__name__})"
        ) from None
    if not intact:
        raise CheckpointError(f"load_checkpoint: {path} was altered: its sha256 does not match its content")
    for file, promised in files.items():
        _check_file(directory / file, int(promised["bytes"]), str(promised["sha256"]))
    return Checkpoint(directory, name, manifest)


def list_checkpoints(directory: Path, *, best: bool = False) -> list[str]:
    """Names of the checkpoints with a manifest, newest first."""
    prefix = "best_step_" if best else "step_"
    names = [path.stem for path in directory.glob(f"{prefix}*.json") if _NAME.fullmatch(path.stem)]
    return sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]), reverse=True)


def newest_intact(
    directory: Path, *, best: bool = False, readable: Callable[[Checkpoint], object] | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be used, and one line about each newer one that cannot.

    Args:
        directory: The run directory.
        best: Look among the ``best_*`` checkpoints.
        readable: Called with a checkpoint; a CheckpointError from it disqualifies the checkpoint as well.
    """
    names = list_checkpoints(directory, best=best)
    skipped: list[str] = []
    for position, name in enumerate(names):
        try:
            checkpoint = open_checkpoint(directory, name)
            if readable is not None:
                readable(checkpoint)
        except CheckpointError as error:
            previous = names[position + 1] if position + 1 < len(names) else None
            skipped.append(
                f"{error}; " + (f"the previous checkpoint is {previous}" if previous else "there is no other")
            )
            continue
        return checkpoint, skipped
    return None, skipped


def remove_checkpoint(directory: Path, name: str) -> None:
    """Delete a checkpoint; the manifest goes first, so that no half of it is ever taken for a whole."""
    for suffix in (".json", ".state.pt", ".safetensors"):
        (directory / f"{name}{suffix}").unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete temporary files of a process that was killed while it wrote."""
    for path in directory.glob(".*.writing"):
        path.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a torch file that holds nothing but tensors and plain data.

    Raises:
        CheckpointError: if the file is missing, truncated, or holds Python objects.
    """
    if not path.is_file():
        raise CheckpointError(f"load_checkpoint: {path} does not exist")
    if path.suffix != ".safetensors":
        content = read_plain(path)
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
        return {name: value for name, value in content.items() if isinstance(value, Tensor)}
    _check_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"load_checkpoint: {path} is not a safetensors file: {error}") from None


def read_plain(path: Path) -> dict[str, Any]:
    """A dict written by ``torch.save``, with nothing but tensors and plain data; nothing in the file is executed.

    Raises:
        CheckpointError: if the file is unreadable or holds any other Python object.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"load_checkpoint: {path} does not exist") from None
    except Exception as error:
        # torch reports damage and forbidden objects by a dozen exception types
        found = re.search(r"(?:GLOBAL|class|function|Unsupported \w+) ([\w.]+\.[\w.]+)", str(error))
        if found or "weights_only" in str(error):
            what = f" ({found[1]})" if found else ""
            raise CheckpointError(
                f"load_checkpoint: {path} holds Python objects{what} besides tensors and plain data; "
                "it was refused and nothing in it was executed"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"load_checkpoint: {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"load_checkpoint: {path} holds a {type(content).__name__}, expected a dict")
    return content


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes with the model's.

    Raises:
        CheckpointError: if they differ; the message lists the first few missing, unexpected and reshaped names.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN_KEYS])}{', ...' if len(names) > _SHOWN_KEYS else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"load_checkpoint: {source} belongs to another model; tensors: {', '.join(problems)}; "
            "use the recipe that it was trained with"
        )


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model, sharded or not; nothing is copied if a name or a shape differs.

    Raises:
        CheckpointError: see `check_weights`.
    """
    check_weights(model, weights, source)
    for name, target in model.state_dict().items():
        target.copy_(like(weights[name], target))


def load_checkpoint(path: str | Path, model: nn.Module) -> None:
    """Load weights from a file, or the best (else the newest) checkpoint from a run directory, into a model.

    Raises:
        CheckpointError: if there is none, or it is damaged, unsafe, or of another model.
    """
    path = Path(path)
    if not path.is_dir():
        manifest = path.with_suffix(".json")
        if path.suffix == ".safetensors" and manifest.is_file():
            open_checkpoint(path.parent, path.stem)
        load_weights(model, read_weights(path), str(path))
        return
    checkpoint = best_or_newest(path)
    load_weights(model, checkpoint.read_weights(), str(checkpoint.weights_path))


def best_or_newest(directory: Path) -> Checkpoint:
    """The best intact checkpoint of a run, or the newest if the run selects none.

    Raises:
        CheckpointError: if the run has no intact checkpoint.
    """
    reasons: list[str] = []
    for best in (True, False):
        checkpoint, skipped = newest_intact(directory, best=best)
        reasons += skipped
        if checkpoint is not None:
            return checkpoint
    if reasons:
        raise CheckpointError(reasons[0])
    raise CheckpointError(f"load_checkpoint: no checkpoint in {directory}")


def to_plain(value: Any, where: str = "state") -> Any:
    """The same data in types that load without executing anything: dict, list, tuple, str, numbers, None, tensors.

    Raises:
        TypeError: if there is anything else; the message says where.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return full(value).detach().cpu()
    if isinstance(value, np.generic):
        return value.item()
    for kind in (int, float, str):  # subclasses, such as the members of an IntEnum
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {to_plain(k, where): to_plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"write_checkpoint: {where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, "
        "lists, tuples and dicts only"
    )


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor (all processes must ask); other tensors as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, target: Tensor) -> Tensor:
    """``value`` sharded as ``target`` is; every process must hold the whole value."""
    if not isinstance(target, DTensor):
        return value
    local = value.to(target.device, target.dtype)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)


def _base(name: str) -> str:
    return name.removeprefix("best_")


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing memory: safetensors refuses tied weights."""
    seen: set[int] = set()
    result = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _write_atomically(path: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    temporary = path.with_name(f".{path.name}.writing")
    write(temporary)
    temporary.chmod(0o644)  # safetensors leaves its files readable by the owner alone
    with open(temporary, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return {"bytes": size, "sha256": digest}


def _check_file(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"load_checkpoint: {path} is missing")
    actual = path.stat().st_size
    if path.suffix == ".safetensors":
        _check_header(path)
    if actual != size:
        fault = "truncated" if actual < size else "longer than it was written"
        raise CheckpointError(
            f"load_checkpoint: {path} is {actual:,} bytes, its manifest promises {size:,}: the file is {fault}"
        )
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise CheckpointError(
            f"load_checkpoint: {path} was altered: its sha256 is {found[:12]}..., its manifest says {digest[:12]}..."
        )


def _check_header(path: Path) -> None:
    """Compare the size of a safetensors file with what its own header promises."""
    actual = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        promised = 8 + length
        if 8 < promised <= actual:
            try:
                entries: Iterable[tuple[str, Any]] = json.loads(file.read(length)).items()
                promised += max(
                    (entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0
                )
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                return  # a damaged header is for the hash, or for safetensors itself, to report
        elif length > 100_000_000:  # safetensors' own limit: the length itself is damaged
            return
    if actual < max(promised, 8):
        raise CheckpointError(
            f"load_checkpoint: {path} is {actual:,} bytes, its header promises {promised:,}: the file is truncated"
        )


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
