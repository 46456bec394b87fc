"""``detection ring3d OUT`` writes samples, ``detection predict`` finds boxes in them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attn_core.engine import TrainedRun


def write_samples(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
    count: Annotated[int, typer.Option(help="How many samples, from the first.")] = 4,
) -> Iterator[str]:
    """Write ring3d samples as folders of pictures that ``predict`` takes.

    Raises: ValueError for an unknown split or a count that it does not have.
    """
    from detection.data.ring3d import SCENES
    from detection.data.ring3d_folders import write_sample

    if split not in SCENES:
        raise ValueError(f"--split must be train or val, got {split}")
    tokens = [(scene, frame) for scene in SCENES[split] for frame in range(4)]
    if not 1 <= count <= len(tokens):
        raise ValueError(f"--count must be 1…{len(tokens)} for split {split}, got {count}")
    for scene, frame in tokens[:count]:
        yield str(write_sample(out, scene, frame))


@torch.inference_mode()
def predict_samples(run: TrainedRun, inputs: Sequence[Path], out: Path, *, threshold: float = 0.3) -> Iterator[str]:
    """Boxes of sample folders (or of folders of them): ``<out>/<token>.png`` and ``.json``, and a line for each.

    Raises: ValueError for a folder without samples, before anything is written.
    """
    from detection.data.ring3d_folders import read_sample
    from detection.pictures.ring3d import draw_sample

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
