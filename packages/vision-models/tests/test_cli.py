"""The command ``vision-models``: training, prediction, export, pictures, and one clear line for every misuse."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attn_core.engine.cli import run_cli
from vision_models import BiFormer, create_model
from vision_models.cli import CLI
from vision_models.data import Digits
from vision_models.pictures.explain.biformer import Routing, routings


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits run of one epoch: not accurate, but complete."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    net = ("model.net.depths=(1,1,1,1)", "model.net.dims=(16,32,32,32)")
    settings = ["epochs=1", "train_dataloader.batch_size=128", *net]
    assert command("train", "--out", str(directory), *(part for s in settings for part in ("--set", s))) == 0
    return directory


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    data = Digits("test")
    pixels = ((data.images[0, 0] + 1) / 2 * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def test_training_leaves_weights_metrics_and_pictures(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.py", "run.json", "metrics.jsonl", "result.json", "curves.png", "predictions.png"} <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert np.asarray(Image.open(run / "predictions.png")).std() > 20
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("accuracy" in line for line in lines)


def test_prediction_names_five_classes_and_draws_the_routing(
    run: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("predict", str(digit), "--run", str(run), "--out", str(tmp_path / "out")) == 0
    line, tables = capsys.readouterr().out.strip().splitlines()
    assert line.count("%") == 5
    assert line.endswith("digit_biformer.png")
    assert tables.endswith("predictions.json")
    first = (tmp_path / "out" / "digit_biformer.png").read_bytes()
    assert (
        command("predict", str(digit), "--run", str(run), "--out", str(tmp_path / "out"), "--region", "0.1", "0.9") == 0
    )
    assert (tmp_path / "out" / "digit_biformer.png").read_bytes() != first


def test_folders_of_pictures_are_mirrored_and_tabled(run: Path, tmp_path: Path) -> None:
    for place in ("a", "b/deeper"):
        (tmp_path / "in" / place).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "in" / place / "same.PNG")
    out = tmp_path / "out"
    assert command("predict", str(tmp_path / "in"), "--run", str(run), "--out", str(out)) == 0
    assert (out / "a" / "same_biformer.png").is_file()
    assert (out / "b" / "deeper" / "same_biformer.png").is_file()
    rows = json.loads((out / "predictions.json").read_text())
    assert [row["file"].removeprefix(str(tmp_path)) for row in rows] == ["/in/a/same.PNG", "/in/b/deeper/same.PNG"]
    assert rows[0]["label"] == max(rows[0]["best"], key=rows[0]["best"].get)
    assert len((out / "predictions.csv").read_text().splitlines()) == 3


def test_eval_writes_the_confusion_of_a_part_beside_the_run(run: Path) -> None:
    assert command("eval", str(run), "--split", "val") == 0
    assert np.asarray(Image.open(run / "eval_val" / "confusion.png").convert("L")).std() > 10
    rows = list(csv.reader((run / "eval_val" / "confusion.csv").read_text().splitlines()))
    assert sum(int(n) for row in rows[1:] for n in row[1:]) == 179
    test = list(csv.DictReader((run / "classes.csv").read_text().splitlines()))
    assert sum(int(row["images"]) for row in test) == 359
    right = json.loads((run / "result.json").read_text())["test"]["accuracy"]
    assert sum(int(row["right"]) for row in test) == pytest.approx(359 * right)


def test_sixty_pictures_in_class_folders_train_and_test_with_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for label, low in (("dark", 0), ("猫", 128)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(low, low + 128, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    run = tmp_path / "run"
    settings = ["--set", "steps=6", "--set", "warmup=1", "--set", "side=32"]
    assert command("train", "pictures", "--data", str(tmp_path / "data"), "--out", str(run), *settings) == 0
    assert "data: train 8, test 4 samples" in capsys.readouterr().out
    assert {"confusion.png", "classes.csv", "predictions.png"} <= {path.name for path in run.iterdir()}
    assert "猫" in (run / "classes.csv").read_text(encoding="utf-8")


@pytest.mark.slow
def test_exported_run_computes_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, name in (("onnx", "d.onnx"), ("torch-export", "d.pt2")):
        assert command("export", str(run), "--format", kind, "--out", str(tmp_path / name)) == 0
        assert "largest relative difference" in capsys.readouterr().out
        assert (tmp_path / name).stat().st_size > 100_000


def test_unusable_pictures_end_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zero.png").touch()
    (tmp_path / "text.png").write_text("text")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    (tmp_path / "bare").mkdir()
    for name, message in {
        "zero.png": "the file is empty (0 bytes)",
        "text.png": "not a picture",
        "nan.tif": "levels are NaN or infinite",
        "bare": "holds no pictures",
        "absent.png": "does not exist",
    }.items():
        capsys.readouterr()
        code = command("predict", str(tmp_path / name), "--run", str(run), "--out", str(tmp_path / "out"))
        shown = capsys.readouterr()
        assert code == 1, name
        assert message in shown.err, name
        assert len(shown.err.strip().splitlines()) == 1
        assert "Traceback" not in shown.err


def test_every_color_mode_is_predicted(run: Path, tmp_path: Path) -> None:
    gray = np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(gray).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(gray).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert command("predict", str(tmp_path), "--run", str(run), "--out", str(tmp_path / "out")) == 0
    assert len(list((tmp_path / "out").glob("*_biformer.png"))) == 4


def test_misuse_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for arguments, code, message in [
        (("train", "biformer_digit", "--out", out), 2, "did you mean 'biformer_digits'?"),
        (("train", "--out", out, "--set", "epoch=3"), 2, "did you mean 'epochs'?"),
        (("train", "--out", out, "--set", "model.net.n_wins=3"), 2, "did you mean 'n_win'?"),
        (("train", "biformer_cifar10", "--out", out, "--set", f"data_root={tmp_path}"), 1, "cifar-10-python.tar.gz"),
        (
            ("train", "biformer_imagenet", "--out", out, "--set", f"data_root={tmp_path}"),
            1,
            "training needs at least two",
        ),
        (("train", "pictures", "--out", out, "--data", f"{tmp_path}/absent"), 1, "absent is not a folder"),
        (("train", "--out", out, "--data", str(tmp_path)), 1, "training needs at least two"),
        (("info", "biformer_tinny"), 2, "did you mean 'biformer_tiny'?"),
        (("predict", str(tmp_path / "absent.png")), 1, "absent.png does not exist"),
        (("trian",), 2, "did you mean 'train'?"),
    ]:
        capsys.readouterr()
        assert command(*arguments) == code, arguments
        shown = capsys.readouterr().err
        assert message in shown, (arguments, shown)
        assert len(shown.strip().splitlines()) == 1, shown


def test_info_knows_recipes_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("biformer_digits", "biformer_imagenet", "biformer_tiny"):
        assert command("info", name) == 0
    assert "13,142,760" in capsys.readouterr().out


def test_recipes_are_complete() -> None:
    """Every recipe builds its network and names only settings that exist."""
    from attn_core.engine.config import find_recipe, load_recipe, recipe_names

    for name in recipe_names("vision_models"):
        config = load_recipe(find_recipe("vision_models", name), scope="vision_models")
        assert config["optim_wrapper"]["optimizer"]["weight_decay"] == 0.05
        family = "biformer" if name == "pictures" else name.partition("_")[0]
        first, _, _ = find_recipe("vision_models", name).read_text(encoding="utf-8").partition("\n")
        assert family in first.lower(), (name, first)


def test_routing_picture_follows_the_tables_of_the_model() -> None:
    model: Any = create_model("test_biformer").eval()
    found = routings(model, torch.randn(3, 112, 112))
    assert [r.stage for r in found] == [1, 2, 3]
    assert [tuple(r.table.shape) for r in found] == [(49, 1), (49, 4), (49, 9)]
    for routing in found:
        torch.testing.assert_close(routing.weight.sum(-1), torch.ones(49))
    routing = Routing(1, (28, 28), (4, 4), found[0].table, found[0].weight)
    assert routing.region_at((0.0, 0.0)) == 0
    assert routing.region_at((1.0, 1.0)) == 48
    assert routing.region_at((0.5, 0.0)) == 21
    assert routing.box(8) == (4, 4, 4, 4)


def test_benchmark_compares_both_formulations(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_core.engine import BenchmarkRequest
    from vision_models.bench import biformer, measure
    from vision_models.commands import benchmark as families

    monkeypatch.setattr(measure, "REPEATS", 1)
    monkeypatch.setattr(biformer, "LARGE_SIDE", 28)
    rows: Any = families.benchmark(BenchmarkRequest(["test_biformer"], 1, torch.device("cpu"), None))
    assert {row["quantity"] for row in rows} >= {"forward, ms", "training step, ms", "training step, peak MiB"}
    assert all(float(row["error"]) < 1e-4 for row in rows)


@pytest.mark.slow
def test_benchmark_runs_token_networks_beside_their_official_formulation(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_core.engine import BenchmarkRequest
    from vision_models.bench import measure
    from vision_models.commands import benchmark as families

    monkeypatch.setattr(measure, "REPEATS", 1)
    names = ["test_dhvt", "test_tap_rvt", "test_tap_fan"]
    rows: Any = families.benchmark(BenchmarkRequest(names, 1, torch.device("cpu"), None))
    assert {row["against"] for row in rows} == {"scores in full"}
    assert all(float(row["error"]) < 1e-4 for row in rows)


def test_benchmark_gives_timms_model_our_weights() -> None:
    from vision_models.bench.timm_peer import timm_peer

    for name in ("davit_tiny", "focalnet_tiny_srf", "halonet26t"):
        ours: Any = create_model(name).eval()
        peer = timm_peer(name, ours).eval()
        assert sum(float(p.detach().double().sum()) for p in peer.parameters()) == pytest.approx(
            sum(float(p.detach().double().sum()) for p in ours.parameters()), rel=1e-9
        )
    with pytest.raises(ValueError, match="benchmark: timm has no halonet_h0 to compare with"):
        timm_peer("halonet_h0", create_model("halonet_h0", device="meta"))


def test_benchmark_names_models_without_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("benchmark", "ravlt_tiny") == 1
    assert (
        "ravlt_tiny has no peer to compare with; BiFormer, DaViT, FocalNet, HaloNet, DeiT, DHVT, MambaOut, "
        "Sparsifiner, SpectFormer, SpectFormerH, FAN, RVT, NAT, TransNeXt have" in capsys.readouterr().err
    )


def test_default_recipe_trains_a_model_of_the_stated_size() -> None:
    from attn_core.engine.config import find_recipe, load_recipe

    options = load_recipe(find_recipe("vision_models", "biformer_digits"))["model"]["net"]
    options.pop("type")
    count = sum(p.numel() for p in BiFormer(**options, device="meta").parameters())
    assert 0.55e6 < count < 0.7e6


@pytest.mark.slow
def test_a_run_of_localization_draws_and_lists_boxes(
    tmp_path: Path, digit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "sat"
    small = ("epochs=1", "model.net.depth=1", "model.net.last_k=1", "model.net.embed_dim=16", "train_cfg.max_epochs=1")
    settings = (*small, "train_dataloader.batch_size=256", "test_evaluator.step=0.5")
    assert command("train", "sat_digits", "--out", str(run), *(p for s in settings for p in ("--set", s))) == 0
    assert np.asarray(Image.open(run / "predictions.png")).std() > 20
    assert json.loads((run / "result.json").read_text())["test"].keys() >= {"gt_known", "top1_loc", "max_box_acc_v2"}
    capsys.readouterr()
    assert command("predict", str(digit), "--run", str(run), "--out", str(tmp_path / "out")) == 0
    assert "digit_map.png" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "out" / "digit_map.png")).std() > 20
    left, top, right, bottom = json.loads((tmp_path / "out" / "predictions.json").read_text())[0]["box"]
    assert 0 <= left < right <= 64
    assert 0 <= top < bottom <= 64
