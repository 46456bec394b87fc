"""The command ``vlm-tools`` on a run of a few steps: files, lines, and one clear line for every misuse."""

import json
from pathlib import Path

import pytest
from PIL import Image

from attn_core.engine.cli import run_cli
from vlm_tools.cli import PACKAGE
from vlm_tools.data import scene

pytestmark = pytest.mark.filterwarnings("ignore")


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(PACKAGE, list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "llava_digits"
    settings = [
        "steps=4",
        "warmup=1",
        "batch_size=8",
        "val_dataloader.dataset.count=12",
        "test_dataloader.dataset.count=12",
    ]
    assert command("train", "--out", str(directory), *(part for s in settings for part in ("--set", s))) == 0
    return directory


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    shown = scene("test", 1003)
    Image.fromarray((shown.image * 255).astype("uint8")).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_answers_maps_and_pages(run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = ("--model", str(run)), ("--out", str(tmp_path / "out"))
    assert command("ask", str(picture), "in the image is there a three", *model, "--method", "logit_boost") == 0
    assert "with logit_boost" in capsys.readouterr().out
    assert command("explain", str(picture), *model, *out, "--tokens", "4") == 0
    assert command("ground", str(picture), "a three", *model, *out, "--reading", "occlusion") == 0
    names = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert names == {".png", ".npz", ".html"}
    assert command("predict", str(picture), "--run", str(run), *out) == 0
    assert "positive point" in capsys.readouterr().out


def test_demo_writes_a_report(run: Path, tmp_path: Path) -> None:
    assert command("demo", "--run", str(run), "--out", str(tmp_path), "--scenes", "10") == 0
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {"baseline", "VAR", "logit boost 1"}
    assert "out of reach" in next(row for row in rows if row["method"] == "VAR")["note"]
    assert "McNemar" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "scenes.png").stat().st_size > 1000


def test_evaluation_of_local_files(
    run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"question_id": 1, "image": picture.name, "text": "in the image is there a three", "label": "yes"}
    (tmp_path / "q.json").write_text(json.dumps([row]))
    arguments = ("evaluate", "pope", str(tmp_path / "q.json"), "--images", str(tmp_path), "--model", str(run))
    assert command(*arguments, "--method", "vcd", "--option", "alpha=0.5") == 0
    assert "McNemar" in capsys.readouterr().out
    (tmp_path / "c.jsonl").write_text(json.dumps({"caption": "a dog", "objects": ["cat"]}))
    assert command("evaluate", "chair", str(tmp_path / "c.jsonl")) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "PICTURE", " "], "the prompt is empty"),
        (["ask", "PICTURE", "a giraffe"], "does not know 'giraffe'"),
        (["ask", "TEXT", "a one"], "is no picture that can be read"),
        (["ask", "missing.png", "a one"], "missing.png"),
        (["ask", "PICTURE", "a one", "--method", "vra"], "unknown method 'vra'; did you mean 'var'"),
        (["ask", "PICTURE", "a one", "--method", "var"], "out of reach"),
        (["ask", "PICTURE", "a one", "--option", "x=1"], "--option belongs to --method"),
        (["ask", "PICTURE", "a one", "--method", "pai", "--option", "x"], "must look like KEY=VALUE"),
        (["ask", "PICTURE", "a one", "--method", "pai", "--option", "alpha=x"], "must be a number"),
        (["sinks", "PICTURE"], "no sink dimensions found"),
        (["ground", "PICTURE", "a one", "--reading", "x"], "reading must be one of"),
        (["evaluate", "mme", "TEXT"], "benchmark must be pope, chair or amber"),
        (["evaluate", "pope", "TEXT"], "needs --images"),
    ],
)
def test_misuse_is_one_line(
    arguments: list[str], words: str, run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    places = {"PICTURE": str(picture), "TEXT": str(tmp_path / "text.png")}
    assert command(*(places.get(word, word) for word in arguments), "--model", str(run)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert words in error[0]
