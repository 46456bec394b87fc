"""Pictures of 3-D boxes and sample folders: edges where they belong, files that come back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.commands.ring3d import predict_samples, write_samples
from detection.data.ring3d import CLASSES, LIDAR2IMG, Ring3D, collate_scenes
from detection.data.ring3d_folders import read_sample, write_sample
from detection.models.bevformer.detector import BEVFormerDFA3D
from detection.pictures.ring3d import draw_scenes, projected_edges
from detection.tasks.bevformer import BEVDetectionTask

SMALL: dict[str, Any] = {
    "backbone": "test_resnet", "dim": 16, "num_layers": 1, "num_points": 4, "num_heads": 2, "bev_size": (8, 8),
    "depth_blocks": 0, "depth_context": None,
}  # fmt: skip


def run(lifting: Any = "dfa3d") -> Any:
    model = BEVDetectionTask(BEVFormerDFA3D(lifting=lifting, **SMALL)).eval()
    torch.nn.init.constant_(model.get_parameter("net.heatmap.bias"), 0.0)  # scores near ½: something to draw
    return SimpleNamespace(model=model, device=torch.device("cpu"), data_info={"classes": list(CLASSES)})


def test_edges_are_cut_at_the_camera() -> None:
    box = np.array([[0.0, 10, 0, 2, 2, 2, 0]])
    (edges,) = projected_edges(box, LIDAR2IMG[0])
    assert len(edges) == 12
    assert np.concatenate(edges)[:, 0].mean() == pytest.approx(80, abs=1e-6)
    assert projected_edges(box, LIDAR2IMG[3]) == [[]]  # behind the rear camera
    (around,) = projected_edges(np.array([[0.0, 0, 0, 8, 8, 1, 0]]), LIDAR2IMG[0])
    assert 0 < len(around) < 12
    assert np.isfinite(np.concatenate(around)).all()


def test_sample_folder_gives_back_what_the_data_set_holds(tmp_path: Path) -> None:
    folder = write_sample(tmp_path, 40, 0)
    sample, item = read_sample(folder, depth=True), Ring3D("val", scenes=1)[0]
    for name in ("image", "depth", "lidar2img", "boxes"):
        torch.testing.assert_close(sample[name], item[name])
    assert sample["names"] == [CLASSES[label] for label in item["labels"]]


@pytest.mark.parametrize("lifting", ["dfa3d", "dfa3d_gt"])
def test_predictions_are_drawn_and_written(tmp_path: Path, lifting: str) -> None:
    assert len(list(write_samples(tmp_path / "in", count=2))) == 2
    (line, _) = predict_samples(run(lifting), [tmp_path / "in"], tmp_path / "out", threshold=0.4)
    assert line.startswith("ring3d-40-0: ")
    rows = json.loads((tmp_path / "out" / "ring3d-40-0.json").read_text())
    assert rows
    assert set(rows[0]) == {"name", "score", "box"}
    assert np.asarray(Image.open(tmp_path / "out" / "ring3d-40-0.png")).std() > 20


def test_end_of_a_run_gets_a_picture(tmp_path: Path) -> None:
    data = Ring3D("val", scenes=1)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate_scenes)
    draw_scenes(run().model, loader, tmp_path / "predictions.png")
    assert np.asarray(Image.open(tmp_path / "predictions.png")).std() > 20


def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no sample\.json; 'detection ring3d OUT' writes"):
        list(predict_samples(run(), [tmp_path], tmp_path / "out"))
    with pytest.raises(ValueError, match="--split must be train or val, got test"):
        list(write_samples(tmp_path, split="test"))
    with pytest.raises(ValueError, match="--count must be 1…40 for split val, got 41"):
        list(write_samples(tmp_path, count=41))
    folder = write_sample(tmp_path, 40, 0)
    (folder / "CAM_BACK.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"CAM_BACK\.png cannot be read"):
        list(predict_samples(run(), [folder], tmp_path / "out"))
    (folder / "CAM_BACK.png").unlink()
    with pytest.raises(ValueError, match=r"CAM_BACK\.png is missing"):
        read_sample(folder)
    Image.new("RGB", (8, 8)).save(folder / "CAM_BACK.png")
    with pytest.raises(ValueError, match="its pictures differ in size"):
        read_sample(folder)
    (folder / "sample.json").write_text("{}")
    with pytest.raises(ValueError, match="is no sample: KeyError 'cams'"):
        read_sample(folder)
    assert not (tmp_path / "out").exists()
