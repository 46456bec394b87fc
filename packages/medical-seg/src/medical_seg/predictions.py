"""``predict``: masks on the grid of the input, in bounded memory, and the pictures of both."""

import os
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from attn_core.engine import TrainedRun

from .data.folders import Case, group_cases
from .data.volumes import PICTURES, SUFFIXES, Volume, measure_scaling, read_volume, sample_image, suffix, target_grid
from .pictures import draw_planes
from .sliding_window import classes_on_grid, label_of, logits_by_planes, rows_needed, window_starts

Network = Callable[[Tensor], Tensor]
Keep = Callable[[int, int, Tensor], None]


@dataclass
class Budget:
    """Memory of this process.

    Attributes:
        allowed: bytes.
        base: bytes that it takes apart from images, labels and sums of logits; None until a first window has passed
            through the network.
    """

    allowed: int
    base: int | None = None


def predict(
    run: TrainedRun,
    inputs: Sequence[Path],
    out: Path,
    *,
    step: Annotated[float, typer.Option(help="Distance of neighboring windows, as a share of the window.")] = 0.5,
    tta: Annotated[str, typer.Option(help="none, or mirror: average over all flips.")] = "none",
    also: Annotated[
        list[Path] | None, typer.Option(help="Further run, such as another fold (repeatable): logits are averaged.")
    ] = None,
    max_mem: Annotated[
        str | None, typer.Option(help="Most memory to use, such as 4G: large volumes are taken in strips.")
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write <case>_probabilities.npy too: float16, (K, *grid).")
    ] = False,
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
    budget = None if max_mem is None else Budget(parse_memory(max_mem))
    info = run.data_info
    if "spacing" not in info or "window" not in info:
        raise ValueError(f"{run.directory}: its data set says nothing about spacing and window (metainfo)")
    network = _network(run, also or [])
    cases = find_inputs(inputs, len(info["channels"]))
    out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        finished = out / f"{case.name}{'.png' if suffix(case.images[0]) in PICTURES else '.nii.gz'}"
        if continue_ and finished.is_file():
            yield f"{case.name}: kept {finished}"
            continue
        volume = read_volume(case.images)
        with _probability_file(volume, out / case.name, run.model, wanted=save_probabilities) as keep:
            mask = segment_volume(
                run.model,
                volume,
                info,
                network=network,
                step=step,
                mirror=tta == "mirror",
                budget=budget,
                keep=keep,
                device=run.device,
            )
        if keep_largest:
            mask = largest_parts(mask)
        path = volume.write_mask(mask, out / case.name)
        unit = "ml" if volume.orientation is not None else "thousand pixels"
        names = _names(run.model, info["classes"])
        counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in mask)  # by planes: it counts in int64
        sizes = [(name, counts[part].sum() * volume.voxel_ml) for name, part in names]  # pyright: ignore[reportIndexIssue]
        what = ", ".join(f"{name} {ml:.1f} {unit}" for name, ml in sizes)
        line = f"{case.name}: {what} → {path}"
        if overlay:
            picture = out / f"{case.name}_overlay.png"
            draw_planes(volume, [("prediction", mask)], _written_names(run.model, info["classes"]), picture)
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
    network: Network | None = None,
    step: float = 0.5,
    mirror: bool = False,
    budget: Budget | None = None,
    keep: Keep | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Labels (Z, Y, X) on the volume's grid.

    Windows are resampled as they are read and logits are compared class by class as planes are finished: neither the
    resampled image nor the logits of the whole volume exist. If even the planes of one window's depth do not fit, the
    volume is taken in strips along Y: windows that touch two of them are computed twice, labels stay the same.

    Args:
        model: a `SegmentationTask` in eval mode.
        volume: the image.
        info: ``spacing``, ``scaling`` and ``channels`` of the training data.
        network: windows → logits; None for the model's own.
        step, mirror: as of `logits_by_planes`.
        budget: None for as much memory as it takes.
        keep: is given the logits of all classes of rows of a plane: (z, first row, (K, y, X)).
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
    network = model.tensor if network is None else network
    window = model.window
    grid = target_grid(volume, info["spacing"], window)

    def read(start: tuple[int, ...]) -> Tensor:
        return sample_image(volume, scalings, grid, start, window)

    strips = 1
    if budget is not None:
        if budget.base is None:
            with torch.no_grad():
                network(read((0, 0, 0))[None].to(device))  # pyright: ignore[reportOptionalCall]
            budget.base = peak_memory() - volume.data.nbytes
        strips = _strips(model.out_channels, window, grid, volume, budget.allowed, budget.base)
    mask = np.zeros(volume.grid, dtype=np.uint8)
    height = volume.grid[1]
    for begin, end in pairwise(round(i * height / strips) for i in range(strips + 1)):
        first, last = rows_needed((begin, end), grid[1], height)
        planes = logits_by_planes(
            network,  # pyright: ignore[reportArgumentType]
            read,
            grid,
            window,
            model.out_channels,
            step=step,
            mirror=mirror,
            rows=(first, last) if strips > 1 else None,
            device=device,
        )
        written = classes_on_grid(planes, grid[0], volume.grid, rows=(begin, end), held=(first, last, grid[1]))
        for z, classes in written:
            if keep is not None:
                logits = torch.stack(list(classes))
                keep(z, begin, logits)
                classes = iter(logits.unbind())
            mask[z, begin:end] = label_of(classes, model.order).numpy()
    return mask


def _strips(classes: int, window: Sequence[int], grid: Sequence[int], volume: Volume, allowed: int, base: int) -> int:
    """In how many strips a volume must be taken; the estimates are from above."""
    held = base + volume.data.nbytes + 4 * int(np.prod(volume.grid))  # labels, and their copies when they are written
    width, strips = max(grid[2], window[2]), 1
    while True:
        rows = -(-max(grid[1], window[1]) // strips) + 2
        # running sums, the planes that are handed over, weights; then maps of a plane on the volume's grid
        needed = held + 4 * (2 * classes + 2) * window[0] * rows * width
        needed += 4 * (classes + 6) * (-(-volume.grid[1] // strips)) * volume.grid[2]
        if needed <= allowed:
            return strips
        if rows <= max(8, window[1] // 4):
            raise ValueError(
                f"{volume.path}: needs {needed / 2**30:.2f} GiB, --max-mem allows {allowed / 2**30:.2f}; "
                "a smaller window or a coarser spacing in training needs less"
            )
        strips *= 2


def _network(run: TrainedRun, also: Sequence[Path]) -> Network:
    """Windows → logits, averaged over runs, as nnU-Net joins its folds."""
    from attn_core.engine.run import open_run

    from .package import PACKAGE

    models: list[Any] = [run.model]
    for path in also:
        other = open_run(PACKAGE, path, device=str(run.device))
        for key in ("channels", "classes", "spacing", "scaling", "window"):
            if other.data_info.get(key) != run.data_info[key]:
                raise ValueError(
                    f"--also: {path} has {key} {other.data_info.get(key)}, {run.directory} has {run.data_info[key]}; "
                    "only runs on one kind of data can be averaged"
                )
        models.append(other.model)
    if len(models) == 1:
        return models[0].tensor
    return lambda image: sum(model.tensor(image) for model in models) / len(models)  # pyright: ignore[reportReturnType]


@contextmanager
def _probability_file(volume: Volume, stem: Path, model: Any, *, wanted: bool) -> Iterator[Keep | None]:
    """Writes probabilities row by row: (K, *shape of the image file) in float16, under its name when it is complete."""
    if not wanted:
        yield None
        return
    part, path = stem.with_name(f".{stem.name}.part.npy"), stem.with_name(f"{stem.name}_probabilities.npy")
    shape = (model.out_channels, *volume.stored_shape)
    np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape).flush()

    def keep(z: int, first: int, logits: Tensor) -> None:
        values = (logits.softmax(0) if model.regions is None else logits.sigmoid()).numpy()
        # Opened anew each time: pages of a mapping that stays open would count as memory of this process.
        file = np.lib.format.open_memmap(part, mode="r+")
        for target, plane in zip(file, values, strict=True):
            volume.canonical(target)[z, first : first + values.shape[1]] = plane

    yield keep
    os.replace(part, path)


def _names(model: Any, classes: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Classes of the foreground and the labels that belong to each."""
    if model.regions is None:
        return [(name, [k]) for k, name in enumerate(classes) if k]
    return list(zip(classes, model.regions, strict=True))


def _written_names(model: Any, classes: Sequence[str]) -> list[str]:
    """Names of the labels 0, 1, 2 … of a mask."""
    if model.regions is None:
        return list(classes)
    names = {label: name for name, label in zip(classes, model.order, strict=True)}
    return ["background", *(names.get(k, f"label {k}") for k in range(1, max(model.order) + 1))]


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
    volume = Volume(data, tuple(info["spacing"] or (1.0,) * 3), np.eye(4), None, None, path)  # pyright: ignore[reportArgumentType]
    masks = [("truth", label.numpy()), ("prediction", found.cpu().numpy())]
    draw_planes(volume, masks, _written_names(model, info["classes"]), path)
