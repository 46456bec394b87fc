"""The command ``vlm-tools`` on a run of a few steps: files, lines, and one clear line for every misuse."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_tools.models.session import open_session
from vlm_tools.testing.random_models import random_model

pytestmark = pytest.mark.filterwarnings("ignore")
Command = Callable[..., int]


def test_answers_maps_and_pages(
    command: Command, run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = ("--model", str(run)), ("--out", str(tmp_path / "out"))
    assert command("ask", str(picture), "in the image is there a three", *model, "--method", "logit_boost") == 0
    assert "with logit_boost" in capsys.readouterr().out
    assert command("explain", str(picture), *model, *out, "--tokens", "4") == 0
    assert command("ground", str(picture), "a three", *model, *out, "--reading", "occlusion") == 0
    names = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert names == {".png", ".npz", ".html"}
    assert command("predict", str(picture), "--run", str(run), *out) == 0
    assert "positive point" in capsys.readouterr().out


def test_predict_mirrors_folders_and_lists_all_captions(
    command: Command, run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b/deep"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "scene.png").write_bytes(picture.read_bytes())
    levels = np.full((20, 30), 1000, dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "in" / "b" / "DARK.TIF")
    out = tmp_path / "out"
    assert command("predict", str(tmp_path / "in"), "--run", str(run), "--out", str(out)) == 0
    rows = json.loads((out / "predictions.json").read_text())
    files = [Path(row["file"]).relative_to(tmp_path / "in").as_posix() for row in rows]
    assert sorted(files) == ["a/scene.png", "b/DARK.TIF", "b/deep/scene.png"]
    captions = {file: row["caption"] for file, row in zip(files, rows, strict=True)}
    assert captions["a/scene.png"] == captions["b/deep/scene.png"]
    assert all(row["picture"] is None or (out / row["picture"]).is_file() for row in rows)
    assert "predictions.csv" in capsys.readouterr().out


def test_demo_writes_a_report(command: Command, run: Path, tmp_path: Path) -> None:
    assert command("demo", "--run", str(run), "--out", str(tmp_path), "--scenes", "10") == 0
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {"baseline", "VAR", "logit boost 1"}
    assert "out of reach" in next(row for row in rows if row["method"] == "VAR")["note"]
    assert "McNemar" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "scenes.png").stat().st_size > 1000


def test_evaluation_of_local_files(
    command: Command, run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    command: Command, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    command: Command, folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        (["ask", "TEXT", "a one"], "text.png: not a picture"),
        (["ask", "CUT", "a one"], "cut.png: the picture is damaged"),
        (["ask", "missing.png", "a one"], "missing.png"),
        (["ask", "PICTURE", "a one", "--method", "vra"], "unknown method 'vra'; did you mean 'var'"),
        (["ask", "PICTURE", "a one", "--method", "var"], "out of reach"),
        (["ask", "PICTURE", "a one", "--option", "x=1"], "--option belongs to --method"),
        (["ask", "PICTURE", "a one", "--method", "pai", "--option", "x"], "must look like KEY=VALUE"),
        (["ask", "PICTURE", "a one", "--method", "pai", "--option", "alpha=x"], "must be a number"),
        (["sinks", "PICTURE"], "no sink dimensions found"),
        (["ground", "PICTURE", "a one", "--reading", "flwo"], "unknown reading; did you mean 'flow'"),
        (["ground", "PICTURE", ""], "the phrase is empty"),
        (["ground", "PICTURE", " ?"], "the phrase is empty, got ' ?'"),
        (["explain", "PICTURE", ""], "the prompt is empty"),
        (["caption", "PICTURE", "--prompt", ""], "the prompt is empty"),
        (["caption", "FOLDER"], "is a folder, not a picture"),
        (["ask", "NOTHING", "a one"], "the file is empty (0 bytes)"),
        (["ask", "PICTURE", "a one", "--method", "pai", "--option", "alpha=NaN"], "alpha must not be negative"),
        (["ask", "PICTURE", "a one", "--method", "pai", "--option", 'alpha="much"'], "alpha must not be negative"),
        (["ask", "PICTURE", "a one", "--method", "vcd", "--option", "step=1.5"], "step must lie in 0 … 999"),
        (["ask", "PICTURE", "a one", "--method", "act", "--option", "heads=[1]"], "heads must map numbers of layers"),
        (["ask", "PICTURE", "a one", "--method", "var", "--option", "dims=3"], "dims must be a list of numbers"),
        (["ask", "PICTURE", "a one", "--method", "agla", "--option", "view=1"], "view must be a tensor"),
        (
            ["ask", "PICTURE", "a one", "--method", "pai", "--option", "layers=[1.5]"],
            "layers must be a list of numbers",
        ),
        (["sinks", "PICTURE", "--tau", "nan"], "tau must be positive"),
        (["evaluate", "pope", "TEXT", "--images", "FOLDER"], "text.png, line 1 is no JSON"),
        (["evaluate", "pope", "FOLDER", "--images", "FOLDER"], "Is a directory"),
        (["evaluate", "pope", "TEXT", "--images", "FOLDER", "--parser", "srtict"], "did you mean 'strict'"),
        (["evaluate", "chair", "NOTHING"], "holds no line such as"),
        (["evaluate", "mme", "TEXT"], "benchmark must be pope, chair or amber"),
        (["evaluate", "pope", "TEXT"], "needs --images"),
    ],
)
def test_misuse_is_one_line(
    command: Command,
    arguments: list[str],
    words: str,
    run: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "nothing.png").touch()
    names = {"PICTURE": picture.name, "TEXT": "text.png", "CUT": "cut.png", "NOTHING": "nothing.png", "FOLDER": ""}
    places = {word: str(tmp_path / name) for word, name in names.items()}
    assert command(*(places.get(word, word) for word in arguments), "--model", str(run)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert words in error[0]
