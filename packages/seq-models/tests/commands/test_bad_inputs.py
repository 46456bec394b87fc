"""Random bad inputs to every verb of the package: an exit code and at most one line, never a traceback.

See `attn_core.testing.commands` for how many are drawn.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_core.testing.commands import answer, assert_foreseen, bad_inputs
from seq_models.cli import CLI

cells = st.one_of(
    st.floats().map(str),
    st.sampled_from(["nan", "inf", "-1e400", "3e38", "0x1", "1_0", "é", "", "1e-320"]),
    st.text(max_size=3),
)
tables = st.lists(st.lists(cells, max_size=3).map(",".join), max_size=5).map("\n".join)
pairs = st.lists(st.tuples(st.floats(), st.floats()).map(lambda row: f"{row[0]} {row[1]}"), max_size=5).map("\n".join)


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


arrays = st.builds(
    lambda shape, dtype: _saved(np.ones(shape).astype(dtype)),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(["f2", "f8", ">f4", "i1", "u8", "?", "c8", "U3", "M8[s]", "i4,f4"]),
)
damaged = st.builds(lambda data, at: data[:at] + b"\xff" + data[at + 1 :], arrays, st.integers(0, 140))
contents = st.one_of(
    st.binary(max_size=60), tables.map(lambda t: t.encode(errors="replace")), pairs.map(str.encode), arrays, damaged
)
files = st.tuples(st.sampled_from([".csv", ".txt", ".npy", ".NPY", ".bin", ""]), contents)


def check(*arguments: str) -> None:
    assert_foreseen(CLI, *arguments)


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task after two steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "a.txt").write_text("words and words " * 40)
    splits = ("train", "val", "test")
    hull = [f"{split}_dataloader.dataset.{name}" for split in splits for name in ("batch=4", "length=2")]
    hull += ["steps=2", "warmup=1", "hidden=8", "train_dataloader.dataset.solved_ahead=8"]
    text = ["steps=2", "warmup=1", "length=16", "model.net.name=test_transnormer", "train_dataloader.batch_size=2"]
    for name, recipe, own, sets in (
        ("points", "pointer_hull5", [], hull), ("text", "transnormer_text", ["--text", str(folder / "a.txt")], text),
    ):  # fmt: skip
        arguments = ["train", recipe, "--out", str(folder / name), *own, *(x for s in sets for x in ("--set", s))]
        made = answer(CLI, *arguments)
        assert made.code == 0, made.lines
    return {name: folder / name for name in ("points", "text")}


@bad_inputs
@given(kind=st.sampled_from(["points", "text"]), files=st.lists(files, min_size=1, max_size=2), folder=st.booleans())
def test_predict_of_any_file_is_an_answer_or_a_line(
    runs: dict[str, Path], kind: str, files: list[tuple[str, bytes]], folder: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"in{number}{suffix}" for number, (suffix, _) in enumerate(files)]
        for path, (_, content) in zip(paths, files, strict=True):
            path.write_bytes(content)
        given = [name] if folder else [str(path) for path in paths]
        check("predict", *given, "--run", str(runs[kind]), "--out", f"{name}/out", "--device", "cpu")


numbers = st.one_of(st.integers(-2, 3), st.floats(), st.sampled_from([2**70, -(2**70), 10**400])).map(str)


@bad_inputs
@given(
    kind=st.sampled_from(["points", "text"]),
    prompt=st.text(st.characters(codec=None), max_size=5),
    values=st.tuples(numbers, numbers, st.sampled_from(["1", "2", "0", "-1", "x"]), numbers),
)
def test_generate_and_demo_take_or_refuse_any_numbers(
    runs: dict[str, Path], kind: str, prompt: str, values: tuple[str, ...]
) -> None:
    length, temperature, beams, seed = values
    options = [f"--length={length[:2]}", f"--temperature={temperature}", f"--beams={beams}", f"--seed={seed}"]
    check("generate", *options, "--run", str(runs[kind]), "--device=cpu", "--", prompt)
    with tempfile.TemporaryDirectory() as name:
        check("demo", "--run", str(runs[kind]), f"--seed={seed}", f"--out={name}/{temperature}.png", "--device=cpu")


@bad_inputs
@given(content=st.binary(max_size=20), suffix=st.sampled_from([".txt", ".png", ""]), folder=st.booleans())
def test_train_on_unusable_text_is_a_line(content: bytes, suffix: str, folder: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"a{suffix}"
        path.write_bytes(content)
        out = Path(name) / "run"
        found = assert_foreseen(
            CLI, "train", "routing_text", "--text", name if folder else str(path), "--out", str(out)
        )
        assert found.code
        assert not out.exists()


@pytest.mark.parametrize("verb", ["info", "export", "eval", "benchmark"])
@bad_inputs
@given(name=st.text(max_size=12).filter(lambda text: not text.startswith("-")))
def test_unknown_names_are_a_line(name: str, verb: str) -> None:
    check(verb, "--", name)
