"""The command ``seq-models``: training, pictures, prediction, generation, and one clear line for every misuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from attn_core.engine.cli import run_cli
from seq_models.cli import CLI


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, list(arguments))
    return int(caught.value.code or 0)


def _trained(directory: Path, recipe: str, *settings: str, text: Path | None = None) -> Path:
    own = [] if text is None else ["--text", str(text)]
    sets = [part for s in settings for part in ("--set", s)]
    assert command("train", recipe, "--out", str(directory), *own, *sets) == 0
    return directory


@pytest.fixture(scope="module")
def hulls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps: not accurate, but complete."""
    sizes = [f"{split}_dataloader.dataset.batch=8" for split in ("train", "val", "test")]
    sizes += ["steps=4", "warmup=1", "hidden=8", "train_dataloader.dataset.solved_ahead=16"]
    return _trained(
        tmp_path_factory.mktemp("runs") / "hulls", "pointer_hull5", *sizes, "test_dataloader.dataset.length=2"
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of bytes after two steps on a folder of text."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(2):
        (folder / f"{number}.txt").write_text("def f(x):\n    return x\n" * 40)
    sizes = ["steps=2", "warmup=1", "length=16", "test_dataloader.dataset.limit=4", "val_dataloader.dataset.limit=4"]
    sizes += ["model.net.name=test_transnormer", "model.net.vocab_size=256", "train_dataloader.batch_size=2"]
    return _trained(tmp_path_factory.mktemp("runs") / "text", "transnormer_text", *sizes, text=folder)


def test_training_leaves_scores_and_pictures(hulls: Path) -> None:
    result = json.loads((hulls / "result.json").read_text())
    assert set(result["test"]) == {"exact", "area", "invalid"}
    assert (hulls / "predictions.png").read_bytes()[1:4] == b"PNG"


def test_points_of_a_file_are_answered_and_drawn(
    hulls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "square.csv").write_text("0,0\n10,0\n10,10\n0,10\n4,5\n")
    np.save(tmp_path / "same.npy", np.ones((4, 2)))  # equal points are legal: they get some answer
    for file in ("square.csv", "same.npy"):
        assert command("predict", str(tmp_path / file), "--run", str(hulls), "--out", str(tmp_path / "out")) == 0
        assert "log p" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"square.png", "same.png"}


def test_the_demo_draws_twelve_instances(hulls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("demo", "--run", str(hulls), "--out", str(tmp_path / "demo.png")) == 0
    assert capsys.readouterr().out.count("(truth ") == 12
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no points"),
        ("1,2,3\n4,5,6\n", "must hold two columns of finite numbers, x and y, got shape (2, 3)"),
        ("1,nan\n2,3\n", "must hold two columns of finite numbers"),
        ("a,b\n", "is not a table of numbers"),
    ],
)
def test_files_without_usable_points_end_in_one_line(
    hulls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    (tmp_path / "points.csv").write_text(content)
    assert command("predict", str(tmp_path / "points.csv"), "--run", str(hulls), "--out", str(tmp_path)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_a_text_is_continued_and_scored(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("generate", "def ", "--run", str(text), "--length", "5", "--temperature", "0") == 0
    assert capsys.readouterr().out.startswith("def ")
    (tmp_path / "a.txt").write_text("import os\n")
    assert command("predict", str(tmp_path / "a.txt"), "--run", str(text), "--out", str(tmp_path)) == 0
    assert "bits per byte over 9 bytes" in capsys.readouterr().out.replace("\n", " ")


def test_options_of_generate_and_demo_change_what_they_say(
    hulls: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert command(*arguments) == 0
        return capsys.readouterr().out

    drawn = ["demo", "--run", str(hulls), "--out", str(tmp_path / "demo.png")]
    assert said(*drawn) != said(*drawn, "--seed", "1")
    written = ["generate", "def ", "--run", str(text)]
    first = said(*written, "--length", "30")
    assert first == said(*written, "--length", "30", "--seed", "0")
    assert first != said(*written, "--length", "30", "--seed", "1")
    assert len(said(*written, "--length", "3", "--temperature", "0")) < len(first)
    greedy = [*written, "--length", "12", "--temperature", "0"]
    assert said(*greedy) == said(*greedy, "--seed", "1")
    assert said(*greedy, "--beams", "4")


def test_results_mirror_the_folders_and_stand_in_one_table(hulls: Path, text: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "x.txt").write_text("0 0\n1 0\n0 1\n")
    for run, columns in ((hulls, {"file", "answer", "log_prob"}), (text, {"file", "bits_per_byte", "bytes"})):
        out = tmp_path / run.name
        assert command("predict", str(tmp_path / "in"), "--run", str(run), "--out", str(out)) == 0
        rows = json.loads((out / "predictions.json").read_text())
        assert [Path(row["file"]).parent.name for row in rows] == ["a", "b"]
        assert set(rows[0]) == columns
    pictures = {str(path.relative_to(tmp_path / hulls.name)) for path in (tmp_path / hulls.name).rglob("*.png")}
    assert pictures == {"a/x.png", "b/x.png"}


def test_a_run_on_own_text_is_evaluated_on_it(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads((text / "result.json").read_text())["test"]["bits_per_token"]
    assert json.loads((text / "run.json").read_text())["data_info"]["source"] == "files of text"
    assert command("eval", str(text)) == 0
    assert f"bits per token: {said:.4g}" in capsys.readouterr().out


def test_own_text_is_learned_as_tokens_and_the_run_keeps_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Satz {i}: schöne Grüße. " * 6}) for i in range(30)), encoding="utf-8"
    )
    made = tmp_path / "made"
    assert command("tokenizer", str(tmp_path / "a.jsonl"), "--vocab-size", "270", "--out", str(made)) == 0
    assert "270 tokens" in capsys.readouterr().out
    assert command("tokenizer", str(tmp_path / "a.jsonl"), "--out", str(made)) == 1
    sets = ["steps=2", "warmup=1", "length=16", "model.net.name=test_transnormer", "train_dataloader.batch_size=2"]
    run = tmp_path / "run"
    own = ["--text", str(tmp_path / "a.jsonl"), "--tokenizer", str(made)]
    assert command("train", "--out", str(run), *own, *(part for s in sets for part in ("--set", s))) == 0
    shutil.rmtree(made)  # the run is whole without it
    measured = json.loads((run / "result.json").read_text())["test"]
    assert measured["bits_per_byte"] < measured["bits_per_token"]
    capsys.readouterr()
    prompt = ["generate", "Satz", "--run", str(run), "--length", "6"]
    for more in ([], ["--top-k", "2"], ["--top-p", "0.2"], ["--repetition-penalty", "9"], ["--temperature", "0"]):
        assert command(*prompt, *more) == 0
        said = capsys.readouterr().out
        assert said.startswith("Satz")
    assert command(*prompt, "--samples", "3") == 0
    assert capsys.readouterr().out.count("---") == 2
    (tmp_path / "b.txt").write_text("Satz 1: schöne Grüße.", encoding="utf-8")
    assert command("predict", str(tmp_path / "b.txt"), "--run", str(run), "--out", str(tmp_path / "out")) == 0
    (row,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert 0 < row["bytes"] < len("Satz 1: schöne Grüße.".encode())
    for wrong, words in (
        (["train", "--tokenizer", str(run / "tokenizer")], "--tokenizer needs --text"),
        ([*prompt, "--temperature", "0", "--top-k", "2"], "nothing is with --temperature 0"),
        ([*prompt, "--temperature", "0", "--samples", "2"], "needs as many --beams"),
    ):
        capsys.readouterr()
        assert command(*wrong) == 1
        assert words in capsys.readouterr().err


def test_what_a_run_cannot_do_is_one_line(
    hulls: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    for arguments, words in (
        (("generate", "", "--run", str(text)), "the prompt is empty"),
        (("generate", "a", "--run", str(hulls)), "holds no language model of text"),
        (("demo", "--run", str(text)), "holds no Pointer Network"),
        (("export", str(hulls), "--out", str(tmp_path / "x.onnx")), "is a Pointer Network, whose answer is a search"),
        (("predict", str(tmp_path / "empty.txt"), "--run", str(text)), "holds 0 bytes of text, too few"),
        (
            ("train", "pointer_hull5", "--text", str(text), "--out", str(tmp_path / "no")),
            "has no setting 'texts'",
        ),
        (("train", "routing_text", "--text", str(tmp_path / "none")), "does not exist"),
        (("train", "pointer_hull5", "--set", "n=2", "--out", str(tmp_path / "n2")), "needs at least 3 points, got n=2"),
    ):
        assert command(*arguments) in (1, 2)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
