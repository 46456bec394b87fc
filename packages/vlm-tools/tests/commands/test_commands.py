"""The command ``vlm-tools`` on a run of a few steps: files, lines, and one clear line for every misuse."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from attn_core.engine.cli import run_cli
from vlm_tools.cli import CLI
from vlm_tools.data import scene
from vlm_tools.models.session import open_session
from vlm_tools.testing.random_models import random_model

pytestmark = pytest.mark.filterwarnings("ignore")


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, list(arguments))
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with its processor, as ``save_pretrained`` writes them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "llava"
    words = ["<pad>", "<s>", "</s>", "<unk>", "is", "there", "a", "dog", "cat", "describe", "the", "image", "."]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)} | {"<image>": 99}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    image = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image, fast, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(path)
    torch.manual_seed(1)
    random_model("test_llava").save_pretrained(path)
    return path


def test_a_folder_of_transformers_works_as_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    red, model, out = str(tmp_path / "red.png"), ("--model", str(folder)), ("--out", str(tmp_path / "out"))
    assert command("ask", red, "is there a dog", *model, "--method", "pai", "--tokens", "3") == 0
    assert "with pai" in capsys.readouterr().out
    assert command("ground", red, "a dog", *model, *out) == 0
    assert command("explain", red, *model, *out, "--tokens", "2", "--reading", "flow") == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".npz", ".html"}
    capsys.readouterr()
    queries = [{"id": 1, "image": "red.png", "query": "describe the image ."}]
    (tmp_path / "q.json").write_text(json.dumps(queries))
    truth = [{"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}]
    (tmp_path / "a.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps({"dog": [], "cat": []}))
    files = ("--annotations", str(tmp_path / "a.json"), "--relations", str(tmp_path / "r.json"))
    assert command("evaluate", "amber", str(tmp_path / "q.json"), "--images", str(tmp_path), *files, *model) == 0
    assert "Cover" in capsys.readouterr().out


def test_models_that_do_not_fit_are_named(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"text": {"model_type": "llama"}, "other": {"model_type": "blip-2"}, "empty": None}
    for name, config in kinds.items():
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    said = {
        str(tmp_path / "text"): "no adapter for model type 'llama'",
        str(tmp_path / "other"): "no adapter for model type 'blip-2'",
        str(tmp_path / "empty"): "transformers cannot open it",
    }
    for model, words in said.items():
        assert command("ask", str(picture), "a dog", "--model", model) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert words in error[0]
    session = open_session(str(folder), device="cpu")
    session.processor = lambda **_: {"input_ids": torch.tensor([[4, 5]])}
    with pytest.raises(ValueError, match=r"puts no image token \(id 99\) into the prompt"):
        session.prepare(Image.new("RGB", (28, 28)), "dog")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "PICTURE", " "], "the prompt is empty"),
        (["ask", "PICTURE", "a giraffe"], "does not know 'giraffe'"),
        (["ask", "TEXT", "a one"], "is no picture that can be read"),
        (["ask", "CUT", "a one"], "cannot be read as a picture"),
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
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    places = {"PICTURE": str(picture), "TEXT": str(tmp_path / "text.png"), "CUT": str(tmp_path / "cut.png")}
    assert command(*(places.get(word, word) for word in arguments), "--model", str(run)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert words in error[0]
