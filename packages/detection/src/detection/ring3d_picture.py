"""Pictures of three-dimensional boxes: in all six cameras and in bird's-eye view; ring3d samples in folders.

A sample folder holds ``sample.json`` (cameras by name with ``img``, ``lidar2img`` and, if known, ``depth`` as file and
``boxes`` (N, 9), ``labels`` of the truth) and its PNG files; depth is 16-bit, in 1/256 m. ``detection ring3d OUT``
writes them, other data can be brought into the same form. Checked in: ``test_ring3d_picture.py``.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from attn_core.engine import TrainedRun

from .data.ring3d import CAMERAS, MIN_PIXELS, SCENES, box_corners, record

LAYOUT = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
COLORS = ("#ff922b", "#4dabf7", "#f06595", "#94d82d", "#b197fc", "#22b8cf", "#fcc419", "#ff8787", "#20c997", "#ced4da")
EDGES = (
    [(i, (i + 1) % 4) for i in range(4)] + [(4 + i, 4 + (i + 1) % 4) for i in range(4)] + [(i, 4 + i) for i in range(4)]
)
NEAR = 0.2  # meters: edges are cut off here
Array = NDArray[np.float64]


def projected_edges(boxes: Array, lidar2img: Array) -> list[list[Array]]:
    """Of every box (N, ≥ 7) the visible parts of its edges in a camera, each (2, 2) in pixels."""
    lines: list[list[Array]] = []
    for corners in box_corners(boxes[:, :7]):
        seen = np.concatenate([corners, np.ones((8, 1))], 1) @ lidar2img.T
        own = []
        for a, b in EDGES:
            p, q = seen[a], seen[b]
            if max(p[2], q[2]) <= NEAR:
                continue
            if min(p[2], q[2]) < NEAR:
                cut = p + (NEAR - p[2]) / (q[2] - p[2]) * (q - p)
                p, q = (cut, q) if p[2] < NEAR else (p, cut)
            own.append(np.stack([p[:2] / p[2], q[:2] / q[2]]))
        lines.append(own)
    return lines


def draw_sample(
    image: Float[Tensor, "K 3 Y X"],
    lidar2img: Float[Tensor, "K 4 4"],
    found: Mapping[str, Tensor],
    path: Path,
    *,
    classes: Sequence[str],
    truth: Mapping[str, Tensor] | None = None,
    threshold: float = 0.3,
    reach: float = 32.0,
    title: str = "",
) -> None:
    """Write one sample with its predictions (colored by class, at least ``threshold``) and truth (dashed, white).

    Args:
        found: boxes (N, ≥ 7), scores, labels. truth: boxes, labels. reach: of the bird's-eye view in m.
    """
    keep = found["scores"] >= threshold
    boxes = found["boxes"][keep].double().numpy()
    labels = found["labels"][keep].tolist()
    scores = found["scores"][keep].tolist()
    true = truth["boxes"].double().numpy() if truth is not None else np.zeros((0, 7))
    figure = Figure(figsize=(15, 5.3), layout="constrained", facecolor="#212529")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.25))
    height, width = image.shape[2:]
    for place, name in enumerate(LAYOUT):
        camera = CAMERAS.index(name)
        axis = figure.add_subplot(grid[divmod(place, 3)])
        axis.imshow(image[camera].permute(1, 2, 0).clamp(0, 1).numpy())
        matrix = lidar2img[camera].double().numpy()
        for edges in projected_edges(true, matrix):
            for line in edges:
                axis.plot(*line.T, color="white", linewidth=0.8, linestyle=(0, (3, 2)))
        for edges, label in zip(projected_edges(boxes, matrix), labels, strict=True):
            for line in edges:
                axis.plot(*line.T, color=COLORS[label % len(COLORS)], linewidth=1.5)
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axis.set_title(name.removeprefix("CAM_").replace("_", " ").lower(), fontsize=9, color="white")
    axis = figure.add_subplot(grid[:, 3])
    _draw_ground(axis, boxes, labels, scores, true, reach)
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], label=name) for i, name in enumerate(classes) if i in labels
    ]
    handles.append(Line2D([], [], color="white", linestyle="--", label="truth"))
    axis.legend(handles=handles, loc="upper right", fontsize=8, facecolor="#343a40", labelcolor="white")
    figure.suptitle(title or f"{len(boxes)} boxes with a score of at least {threshold}", color="white", fontsize=10)
    figure.savefig(path, dpi=110, facecolor=figure.get_facecolor())


def _draw_ground(
    axis: Axes, boxes: Array, labels: Sequence[int], scores: Sequence[float], truth: Array, reach: float
) -> None:
    axis.set_facecolor("#343a40")
    for distance in range(10, int(reach) + 1, 10):
        angle = np.linspace(0, 2 * np.pi, 120)
        axis.plot(distance * np.cos(angle), distance * np.sin(angle), color="#495057", linewidth=0.6)
    axis.plot(0, 0, marker="^", color="white", markersize=7)
    for corners in box_corners(truth[:, :7]):
        axis.plot(*corners[[0, 1, 2, 3, 0], :2].T, color="white", linewidth=0.8, linestyle=(0, (3, 2)))
    for box, corners, label, score in zip(boxes, box_corners(boxes[:, :7]), labels, scores, strict=True):
        color = COLORS[label % len(COLORS)]
        axis.plot(*corners[[0, 1, 2, 3, 0], :2].T, color=color, linewidth=1.6)
        front = (corners[0, :2] + corners[3, :2]) / 2
        axis.plot(*np.stack([box[:2], front]).T, color=color, linewidth=1.6)
        above = (box[0], corners[:, 1].max() + reach / 100)
        axis.annotate(f"{score:.2f}", above, ha="center", va="bottom", fontsize=7, color="white")
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axis.tick_params(colors="white", labelsize=7)
    axis.set_xlabel("x, m (right)", color="white", fontsize=8)
    axis.set_ylabel("y, m (forward)", color="white", fontsize=8)


@torch.no_grad()
def draw_scenes(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """The sample of the loader's first batch that has the most objects, for the end of a run."""
    batch = next(iter(loader))
    device = next(model.parameters()).device
    moved = {
        key: value.to(device) if isinstance(value, Tensor) else [part.to(device) for part in value]
        for key, value in batch.items()
    }
    found = model.predict(**moved)  # pyright: ignore[reportCallIssue]
    best = max(range(len(found)), key=lambda i: len(batch["boxes"][i]))
    draw_sample(
        batch["image"][best],
        batch["lidar2img"][best],
        found[best],
        path,
        classes=loader.dataset.metainfo["classes"],  # pyright: ignore[reportAttributeAccessIssue]
        truth={"boxes": batch["boxes"][best], "labels": batch["labels"][best]},
    )


def write_samples(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
    count: Annotated[int, typer.Option(help="How many samples, from the first.")] = 4,
) -> Iterator[str]:
    """Write ring3d samples as folders of pictures that ``predict`` takes.

    Raises: ValueError for an unknown split or a count that it does not have.
    """
    if split not in SCENES:
        raise ValueError(f"--split must be train or val, got {split}")
    tokens = [(scene, frame) for scene in SCENES[split] for frame in range(4)]
    if not 1 <= count <= len(tokens):
        raise ValueError(f"--count must be 1…{len(tokens)} for split {split}, got {count}")
    for scene, frame in tokens[:count]:
        yield str(write_sample(out, scene, frame))


def write_sample(out: Path, scene: int, frame: int) -> Path:
    """Write one ring3d sample; returns its folder."""
    sample = record(scene, frame)
    folder = out / sample["token"]
    folder.mkdir(parents=True, exist_ok=True)
    cameras: dict[str, Any] = {}
    for name, camera in sample["cams"].items():
        Image.fromarray(camera["img"]).save(folder / f"{name}.png")
        Image.fromarray(camera["depth"]).save(folder / f"{name}_depth.png")
        cameras[name] = {"img": f"{name}.png", "depth": f"{name}_depth.png", "lidar2img": camera["lidar2img"].tolist()}
    visible = sample["num_pixels"] >= MIN_PIXELS
    boxes = np.concatenate([sample["gt_boxes"], sample["gt_velocity"]], 1)[visible]
    names = [name for name, seen in zip(sample["gt_names"], visible, strict=True) if seen]
    content = {"token": sample["token"], "cams": cameras, "boxes": boxes.tolist(), "names": names}
    (folder / "sample.json").write_text(json.dumps(content, indent=1))
    return folder


def read_sample(folder: Path, *, depth: bool = False) -> dict[str, Any]:
    """``image`` (6, 3, Y, X), ``lidar2img``, ``depth`` (6, Y, X) if asked for, and ``boxes``, ``names`` if given.

    Raises: ValueError that names what is missing or damaged.
    """
    path = folder / "sample.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no sample.json; 'detection ring3d OUT' writes folders of the right form")
    try:
        content = json.loads(path.read_text())
        cameras = [content["cams"][name] for name in CAMERAS]
        matrices = torch.tensor([camera["lidar2img"] for camera in cameras], dtype=torch.float32).view(6, 4, 4)
        files = [folder / camera["img"] for camera in cameras]
        depths = [folder / camera["depth"] for camera in cameras] if depth else []
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no sample: {type(error).__name__} {error}") from None
    images = [_read_png(file, "RGB") for file in files]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{path}: its pictures differ in size")
    sample: dict[str, Any] = {"image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255}
    sample |= {"lidar2img": matrices, "token": content.get("token", folder.name)}
    if depths:
        sample["depth"] = torch.from_numpy(
            np.stack([_read_png(file, None) for file in depths]) / np.float32(256)
        ).float()
    if "boxes" in content:
        sample["boxes"] = torch.tensor(content["boxes"], dtype=torch.float32).view(-1, 9)
        sample["names"] = content.get("names", [])
    return sample


def _read_png(path: Path, mode: Literal["RGB"] | None) -> NDArray[Any]:
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert(mode) if mode else opened).copy()
    except (OSError, UnidentifiedImageError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise ValueError(f"{path} {reason}") from None


@torch.inference_mode()
def predict_samples(run: TrainedRun, inputs: Sequence[Path], out: Path, *, threshold: float = 0.3) -> Iterator[str]:
    """Boxes of sample folders (or of folders of them): ``<out>/<token>.png`` and ``.json``, and a line for each.

    Raises: ValueError for a folder without samples, before anything is written.
    """
    net: Any = run.model.net  # pyright: ignore[reportAttributeAccessIssue]
    needs_depth = net.lifting == "dfa3d_gt"
    folders: list[Path] = []
    for path in inputs:
        inside = sorted(entry.parent for entry in path.glob("*/sample.json")) if path.is_dir() else []
        folders += [path] if (path / "sample.json").is_file() or not inside else inside
    samples = [read_sample(folder, depth=needs_depth) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    classes = run.data_info["classes"]
    for sample in samples:
        batch = {
            key: sample[key].unsqueeze(0).to(run.device) for key in ("image", "lidar2img", "depth") if key in sample
        }
        found = {key: value.cpu() for key, value in net.decode(net(**batch))[0].items()}
        truth = {"boxes": sample["boxes"]} if "boxes" in sample else None
        picture = out / f"{sample['token']}.png"
        draw_sample(
            sample["image"], sample["lidar2img"], found, picture, classes=classes, truth=truth, threshold=threshold
        )
        rows = [
            {"name": classes[int(label)], "score": round(float(score), 4), "box": [round(v, 3) for v in box.tolist()]}
            for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True)
            if score >= threshold
        ]
        (out / f"{sample['token']}.json").write_text(json.dumps(rows, indent=1))
        yield f"{sample['token']}: {len(rows)} boxes → {picture}"
