"""The command ``detection``: training, evaluation, prediction, export, resume, and one clear line for every misuse."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attn_core.engine.cli import run_cli
from detection.cli import CLI
from detection.data.digits_coco import pictures

SMALL = (
    "epochs=2",
    "model.net.backbone=test_resnet",
    "model.net.backbone_options={'stride':16,'frozen_norm':False}",
    "model.net.dim=32",
    "model.net.queries=8",
    "model.net.queries_many=8",
    "model.net.num_layers=1",
    "train_dataloader.dataset.limit=16",
    "val_dataloader.dataset.limit=4",
    "test_dataloader.dataset.limit=4",
)
RECIPE = '''"""Plain-DETR on the pictures of a test."""
from torch.optim import AdamW

from detection.data import CocoDetection, collate_detection
from detection.tasks.detection import DetectionTask
from detection.metrics.coco_map import CocoMap
from detection.models import create_model

data_root = "data"
model = dict(type=DetectionTask, net=dict(type=create_model, name="test_plain_detr", num_classes=2))
data = dict(type=CocoDetection, root=data_root, split="train", num_classes=2, transform=dict(short_sides=(64,)))
train_dataloader = dict(dataset=data, batch_size=1, collate_fn=collate_detection)
val_dataloader = dict(dataset=data, batch_size=1, collate_fn=collate_detection)
val_evaluator = dict(type=CocoMap)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.05))
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
'''


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, list(arguments))
    return int(caught.value.code or 0)


def small(out: Path) -> list[str]:
    return ["train", "--out", str(out), "--device", "cpu", *(part for s in SMALL for part in ("--set", s))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits run of two short epochs: it finds nothing yet, but is complete."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    assert command(*small(directory)) == 0
    return directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number, (pixels, _, _) in enumerate(pictures("val")[:2]):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def test_a_run_leaves_weights_metrics_and_pictures_and_is_evaluated_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.py", "run.json", "metrics.jsonl", "result.json", "curves.png", "predictions.png"} <= names
    assert np.asarray(Image.open(run / "predictions.png")).std() > 20
    assert Image.open(run / "predictions.png").width <= 1100
    table = (run / "categories.csv").read_text()
    assert table.startswith("category,AP\n")
    capsys.readouterr()
    assert command("eval", str(run), "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "test mAP50:" in shown
    assert all(f"test AP/{row.split(',')[0]}: " in shown for row in table.splitlines()[1:])
    assert (run / "eval_test" / "categories.csv").read_text() == table


def test_predictions_are_drawn_and_written_as_coco_results(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("predict", str(folder), "--run", str(run), "--out", str(out), "--threshold", "0") == 0
    results = json.loads((out / "predictions.json").read_text())
    assert {entry["file"] for entry in results} == {str(folder / "0.png"), str(folder / "1.png")}
    assert len((out / "predictions.csv").read_text().splitlines()) == len(results) + 1
    assert {entry["image_id"] for entry in results} == {1, 2}
    assert {entry["category_id"] for entry in results} <= set(range(1, 11))
    assert [entry["file_name"] for entry in json.loads((out / "images.json").read_text())] == [
        str(folder / "0.png"), str(folder / "1.png")
    ]  # fmt: skip
    drawn = np.asarray(Image.open(out / "0.png").convert("RGB"))
    assert drawn.shape == (384, 384, 3)
    assert (drawn == np.asarray(Image.open(folder / "0.png")).repeat(3, 0).repeat(3, 1)).mean() < 0.99


def test_folders_are_searched_and_mirrored_and_no_boxes_are_an_answer(run: Path, folder: Path, tmp_path: Path) -> None:
    below = folder / "deep" / "er"
    below.mkdir(parents=True)
    (folder / "0.png").rename(below / "1.PNG")
    out = tmp_path / "out"
    assert command("predict", str(folder), "--run", str(run), "--out", str(out), "--threshold", "1") == 0
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == ["1.png", "deep/er/1.png"]
    assert json.loads((out / "predictions.json").read_text()) == []
    assert len(json.loads((out / "images.json").read_text())) == 2


def test_frames_of_a_video_are_drawn_and_counted(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.open(folder / f"{number}.png") for number in (0, 1, 0)]
    video, out = tmp_path / "street.gif", tmp_path / "out"
    frames[0].save(video, save_all=True, append_images=frames[1:], duration=40)
    arguments = ("--run", str(run), "--out", str(out), "--threshold", "0")
    assert command("predict", str(video), str(folder / "0.png"), *arguments, "--every", "2") == 0
    assert sorted(path.name for path in out.rglob("*.png")) == ["0.png", "street_000000.png", "street_000002.png"]
    images = json.loads((out / "images.json").read_text())
    assert [(Path(image["file_name"]).name, image.get("frame")) for image in images] == [
        ("street.gif", 0), ("street.gif", 2), ("0.png", None)
    ]  # fmt: skip
    results = json.loads((out / "predictions.json").read_text())
    assert {entry.get("frame") for entry in results if entry["file"] == str(video)} == {0, 2}
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    for path, option, message in (
        (broken, "1", f"{broken}: the video cannot be read, or has no frames"),
        (video, "0", "--every must be"),
    ):
        capsys.readouterr()
        assert command("predict", str(path), "--run", str(run), "--out", str(tmp_path / "x"), "--every", option) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_unreadable_pictures_end_in_one_line_and_nothing_is_written(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (folder / "z.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    out = tmp_path / "out"
    for name, message in (
        (folder, "z.jpg: the picture is damaged"),
        (tmp_path / "empty", "holds no pictures"),
        (tmp_path / "text.png", "not a picture"),
        (tmp_path / "absent.png", "absent.png does not exist"),
    ):
        capsys.readouterr()
        assert command("predict", str(name), "--run", str(run), "--out", str(out)) == 1, name
        shown = capsys.readouterr().err
        assert message in shown
        assert len(shown.strip().splitlines()) == 1, shown
        assert not out.exists() or not list(out.iterdir())
    assert command("predict", str(folder), "--run", str(run), "--out", str(out), "--threshold", "2") == 1
    assert "--threshold must be in [0, 1], got 2" in capsys.readouterr().err


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 5, 20, 10], "area": 200}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    } | changes


def annotation(**changes: Any) -> dict[str, Any]:
    return coco(annotations=[{**coco()["annotations"][0], **changes}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a json file"),
        ({}, "it has no list 'images'"),
        (coco(images=[]), "the list of images is empty"),
        (coco(categories=[]), "the list of categories is empty, there is nothing to detect"),
        (coco(images=[{"id": 7, "file_name": "b.png", "width": 60, "height": 40}]), "1 of 1 image files are missing"),
        (annotation(category_id=3), "category_id=3, which is not in the list"),
        (annotation(bbox=[0, 0, float("nan"), 5]), "has the box [0, 0, nan, 5]"),
        (coco(categories=[{"id": i, "name": "x"} for i in (1, 2, 3)]), "has 3 classes (contiguous), the model has 2"),
    ],
)
def test_bad_annotations_end_in_one_line_before_a_run_exists(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, content)
    assert command(*own_data(tmp_path)) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "_annotations.coco.json" in shown
    assert len(shown.strip().splitlines()) == 1, shown
    assert not (tmp_path / "run").exists()


def test_a_damaged_training_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path, coco())
    (tmp_path / "train" / "a.png").write_bytes((tmp_path / "train" / "a.png").read_bytes()[:60])
    assert command(*own_data(tmp_path)) == 1
    shown = capsys.readouterr().err.strip().splitlines()
    assert "a.png: the picture is damaged" in shown[-1]
    assert "Traceback" not in "".join(shown)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_boxes_outside_are_left_out_and_a_run_on_own_data_predicts_its_categories(tmp_path: Path) -> None:
    record = coco()["annotations"][0]
    write_data(tmp_path, coco(annotations=[record, {**record, "id": 2, "bbox": [70, 5, 20, 10]}]))
    assert command(*own_data(tmp_path)) == 0
    picture = str(tmp_path / "train" / "a.png")
    assert command("predict", picture, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"),
                   "--threshold", "0") == 0  # fmt: skip
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {entry["category_id"] for entry in results} <= {1, 2}
    assert max(entry["bbox"][0] + entry["bbox"][2] for entry in results) < 120


def write_data(root: Path, content: Any) -> None:
    (root / "train").mkdir()
    Image.fromarray(np.arange(7200, dtype=np.uint8).reshape(40, 60, 3)).save(root / "train" / "a.png")
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "train" / "_annotations.coco.json").write_text(text)
    (root / "plain_detr_own.py").write_text(RECIPE)


def own_data(root: Path) -> list[str]:
    return ["train", str(root / "plain_detr_own.py"), "--set", f"data_root={root}", "--out", str(root / "run"),
            "--device", "cpu"]  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_the_undisturbed_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = [sys.executable, "-m", "detection", *small(out), "--set", "default_hooks.checkpoint.every_epochs=1"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
    try:
        while not list(out.glob("step_*.safetensors")) and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert command("train", "--resume", "--out", str(out), "--device", "cpu") == 0
    ended, expected = (json.loads((path / "result.json").read_text()) for path in (out, run))
    assert ended["test"] == expected["test"]


@pytest.mark.slow
def test_exported_run_computes_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", str(run), "--format", "torch-export", "--out", str(tmp_path / "d.pt2")) == 0
    assert "largest relative difference" in capsys.readouterr().out


def test_misuse_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for arguments, code, message in (
        (("train", "bvr_digit", "--out", out), 2, "did you mean 'bvr_digits'?"),
        (("train", "--out", out, "--set", "model.net.querys=3"), 2, "did you mean 'queries'?"),
        (("train", "plain_detr_coco_sup", "--out", out, "--set", f"data_root={tmp_path}"), 1, "holds neither"),
        (("info", "plain_detr_resnet5"), 2, "did you mean 'plain_detr_resnet50'?"),
        (("benchmark", "plain_detr_resnet50"), 1, "measures attention, not models"),
        (("export", "bvr_fcos_resnet50", "--out", out), 1, "only Plain-DETR can be exported"),
    ):
        capsys.readouterr()
        assert command(*arguments) == code, arguments
        shown = capsys.readouterr().err
        assert message in shown, (arguments, shown)
        assert len(shown.strip().splitlines()) == 1, shown


def test_recipes_are_complete_and_say_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from attn_core.engine.config import find_recipe, load_recipe, recipe_names

    for name in recipe_names("detection"):
        config = load_recipe(find_recipe("detection", name), scope="detection")
        optimizer = config["optim_wrapper"]["optimizer"]
        assert optimizer["weight_decay"] >= (1e-4 if "momentum" in optimizer else 0.01)  # or AdamW's
    assert command("list") == 0
    listed = capsys.readouterr().out
    assert "plain_detr_coco_sup" in listed
    assert "plain_detr_vit_base" in listed
    assert "featenhancer " in listed
    assert command("info", "oat_amazon") == 0
    assert "system: OAT" in capsys.readouterr().out


def test_benchmark_measures_each_formulation(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_core.engine import BenchmarkRequest
    from detection.bench import attention as benchmark

    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "QUERIES", 40)
    monkeypatch.setattr(benchmark, "SIZE", (10, 14))
    monkeypatch.setattr(benchmark, "MAPS", ((6, 8), (3, 4)))
    rows: Any = list(benchmark.benchmark(BenchmarkRequest([], 1, torch.device("cpu"), None)))
    assert [row["formulation"] for row in rows] == ["no bias tensor", "bias tensor", *["attn_core", "grid_sample"] * 2]
    assert all(float(row["of the memory"]) < 1 for row in rows[::2])


def test_the_fallback_that_is_measured_computes_the_same() -> None:
    from attn_core import deformable_attention
    from detection.bench.attention import sampled

    torch.manual_seed(0)
    maps = ((6, 8), (3, 4))
    value = torch.randn(2, 60, 2, 4, dtype=torch.float64)
    locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64)
    weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(sampled(value, maps, locations, weights),
                               deformable_attention(value, maps, locations, weights))  # fmt: skip
