"""``predict``: masks on the grid of the input, in bounded memory, and the pictures of both."""

import logging
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from attn_core.engine import TrainedRun

from .data.folders import Case, group_cases
from .data.volumes import SUFFIXES, Volume, measure_scaling, read_volume, sample_image, suffix, target_grid
from .pictures import draw_planes
from .sliding_window import labels_from_planes, logits_by_planes, window_starts

logger = logging.getLogger(__name__)


def predict(
    run: TrainedRun,
    inputs: Sequence[Path],
    out: Path,
    *,
    step: Annotated[float, typer.Option(help="Distance of neighboring windows, as a share of the window.")] = 0.5,
    tta: Annotated[str, typer.Option(help="none, or mirror: average over all flips.")] = "none",
    max_mem: Annotated[str | None, typer.Option(help="Refuse what would need more memory, such as 4G.")] = None,
    keep_largest: Annotated[
        bool, typer.Option("--keep-largest", help="Keep the largest connected part of each class.")
    ] = False,
    overlay: Annotated[bool, typer.Option("--overlay/--no-overlay", help="Write a picture of each case.")] = True,
    continue_: Annotated[bool, typer.Option("--continue", help="Skip cases whose mask is there already.")] = False,
) -> Iterator[str]:
    """One mask per case, ``<out>/<case>.nii.gz`` or ``.png``: shape, affine and header of the input.

    Raises:
        ValueError: an option or an input that cannot be used; more memory needed than allowed.
    """
    if tta not in ("none", "mirror"):
        raise ValueError(f"--tta: {tta!r} is not one of none, mirror")
    window_starts(1, 1, step)  # a wrong step is refused before anything is read
    allowed = None if max_mem is None else parse_memory(max_mem)
    info = run.data_info
    if "spacing" not in info or "window" not in info:
        raise ValueError(f"{run.directory}: its data set says nothing about spacing and window (metainfo)")
    cases = find_inputs(inputs, len(info["channels"]))
    out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        there = [out / f"{case.name}{end}" for end in (".nii.gz", ".png") if (out / f"{case.name}{end}").is_file()]
        if continue_ and there and suffix(there[0]) == (".png" if suffix(case.images[0]) == ".png" else ".nii.gz"):
            yield f"{case.name}: kept {there[0]}"
            continue
        volume = read_volume(case.images)
        mask = segment_volume(
            run.model, volume, info, step=step, mirror=tta == "mirror", allowed=allowed, device=run.device
        )
        if keep_largest:
            mask = largest_parts(mask)
        path = volume.write_mask(mask, out / case.name)
        sizes = np.bincount(mask.ravel(), minlength=len(info["classes"])) * volume.voxel_ml
        unit = "ml" if volume.orientation is not None else "thousand pixels"
        what = ", ".join(f"{name} {ml:.1f} {unit}" for name, ml in zip(info["classes"][1:], sizes[1:], strict=False))
        line = f"{case.name}: {what} → {path}"
        if overlay:
            picture = out / f"{case.name}_overlay.png"
            draw_planes(volume, [("prediction", mask)], info["classes"], picture)
            line += f", {picture.name}"
        yield line


def find_inputs(inputs: Sequence[Path], channels: int) -> list[Case]:
    """Cases of files and folders; a folder of DICOM slices is one case.

    Raises: ValueError for a folder without images, a case without all its channels, more channels than the network's.
    """
    files: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(f for f in path.iterdir() if suffix(f) and not f.name.startswith("."))
        if not found and not any(path.glob("*.dcm")):
            raise ValueError(f"{path}: holds no images ({', '.join(SUFFIXES)})")
        files += found or [path]
    cases = group_cases(files, channels)
    for case in cases:
        if len(case.images) > channels:
            raise ValueError(
                f"{case.images[channels]}: the network reads {channels} channels, case {case.name!r} has more"
            )
    return cases


def segment_volume(
    model: Any,
    volume: Volume,
    info: dict[str, Any],
    *,
    step: float = 0.5,
    mirror: bool = False,
    allowed: int | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Labels (Z, Y, X) on the volume's grid.

    Windows are resampled as they are read and logits are compared class by class as planes are finished: neither the
    resampled image nor the logits of the whole volume exist.

    Args:
        model: a `SegmentationTask` in eval mode.
        volume: the image.
        info: ``spacing``, ``scaling`` and ``classes`` of the training data.
        step, mirror: as of `logits_by_planes`.
        allowed: bytes of memory, or None.
        device: of the model.

    Raises: ValueError if the channels differ from the network's, the image is not finite, or memory does not suffice.
    """
    if len(volume.data) != len(info["channels"]):
        raise ValueError(
            f"{volume.path}: {len(volume.data)} channels, the network reads {len(info['channels'])} "
            f"({', '.join(info['channels'])})"
        )
    scalings = [measure_scaling(channel, rule) for channel, rule in zip(volume.data, info["scaling"], strict=True)]
    if not all(np.isfinite([scaling.mean, scaling.std]).all() for scaling in scalings):
        raise ValueError(f"{volume.path}: holds NaN or infinity")
    grid = target_grid(volume, info["spacing"])
    classes, window = model.out_channels, model.window

    def read(start: tuple[int, ...]) -> Tensor:
        return sample_image(volume, scalings, grid, start, window)

    if allowed is not None:
        with torch.no_grad():
            model.tensor(read((0, 0, 0))[None].to(device))  # what the network itself takes, seen in the peak so far
        needed = peak_memory() + _buffers(classes, window, grid, volume.grid)
        if needed > allowed:
            raise ValueError(
                f"{volume.path}: needs {needed / 2**30:.2f} GiB, --max-mem allows {allowed / 2**30:.2f}; "
                "a smaller window or a coarser spacing in training needs less"
            )
    planes = logits_by_planes(model.tensor, read, grid, window, classes, step=step, mirror=mirror, device=device)
    mask = np.zeros(volume.grid, dtype=np.uint8)
    for z, labels in labels_from_planes(planes, grid[0], volume.grid):
        mask[z] = labels.numpy()
    return mask


def _buffers(classes: int, window: Sequence[int], grid: Sequence[int], written: Sequence[int]) -> int:
    """Bytes that the sliding window and the labels will take, from above."""
    plane = max(grid[1], window[1]) * max(grid[2], window[2])
    sums = (2 * classes * window[0] + 3 * window[0]) * plane * 4  # running sums, and the finished planes
    return sums + 6 * written[1] * written[2] * 4 + 4 * int(np.prod(written))  # labels, and their copies when written


def peak_memory() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_memory(text: str) -> int:
    """``"4G"`` → bytes; K, M, G, T are powers of 1024.

    Raises: ValueError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"--max-mem: expected a size such as 4G or 800M, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def largest_parts(mask: np.ndarray) -> np.ndarray:
    """Of each class the largest part that is connected through faces; the rest becomes background."""
    from scipy import ndimage

    kept = np.zeros_like(mask)
    for k in range(1, int(mask.max()) + 1):
        parts, count = ndimage.label(mask == k)  # pyright: ignore
        if count:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            kept[parts == sizes.argmax()] = k
    return kept


@torch.no_grad()
def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Three planes of the first test case: image, truth, prediction."""
    info = loader.dataset.metainfo  # pyright: ignore
    item = loader.dataset[0]  # pyright: ignore
    image, label = item["image"], item["label"]
    segment: Callable[[Tensor], Tensor] = model.segment  # pyright: ignore
    found = segment(image.to(next(model.parameters()).device))
    data = image[:1].numpy()
    volume = Volume(data, tuple(info["spacing"]), np.eye(4), None, None, path)
    draw_planes(volume, [("truth", label.numpy()), ("prediction", found.cpu().numpy())], info["classes"], path)
