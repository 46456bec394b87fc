"""Whatever is typed or lies in a file: one line and an exit code, no traceback, no hang.

See `attn_core.testing.commands` for how many are drawn.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from attn_core.testing.commands import answer, assert_foreseen, bad_inputs
from vision_models.cli import CLI


def refused(*arguments: str) -> None:
    assert_foreseen(CLI, *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on pictures of 16×16."""
    folder = tmp_path_factory.mktemp("bad")
    for label in ("a", "b"):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "data" / label / f"{i}.png")
    tiny = ["steps=2", "warmup=1", "side=32", "model.net.dims=(16,32,32,32)", "batch=4"]
    arguments = [part for setting in tiny for part in ("--set", setting)]
    made = answer(CLI, "train", "pictures", "--data", str(folder / "data"), "--out", str(folder / "run"), *arguments)
    assert made.code == 0, made.lines
    return folder / "run"


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
VALUES = st.one_of(
    WORDS,
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "None", "[]", "{}", "()", "1e999", "nan", "-1", "0", "True", "[1,2", "'", "a.b", "-", "--", "{1:2}"]
    ),
)
KEYS = st.one_of(
    WORDS,
    st.sampled_from(
        [
            *(
                "steps",
                "warmup",
                "batch",
                "rate",
                "side",
                "classes",
                "data_root",
                "model",
                "model.net",
                "model.net.dims",
            ),
            *("model.net.type", "model.type", "model.label_smoothing", "model.net.topks", "model.net.n_win"),
            *("train_dataloader.batch_size", "train_dataloader.num_workers", "train_dataloader.dataset.type"),
            *("optim_wrapper.optimizer.lr", "optim_wrapper.optimizer.type", "optim_wrapper.accumulative_counts"),
            *("param_scheduler", "param_scheduler.0.end", "train_cfg.max_iters", "custom_hooks.0.momentum"),
            *("randomness.seed", "test_evaluator.type", "compile", "load_from", "strategy.type", "default_scope"),
        ]
    ),
)


@bad_inputs
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=2))
def test_random_settings_end_in_one_line(run: Path, pairs: list[tuple[str, str]]) -> None:
    out = run.parent / "set"
    # a build that succeeds trains two steps; sizes that would take minutes are not wrong input
    large = any(value.strip("+-_").isdigit() and int(value) > 64 for _, value in pairs)
    if large and any(key in ("steps", "batch", "side", "train_cfg.max_iters") or "." in key for key, _ in pairs):
        return
    arguments = [part for key, value in pairs for part in ("--set", f"{key}={value}")]
    fixed = ["steps=2", "warmup=1", "side=32", "batch=4"]
    first = [part for setting in fixed for part in ("--set", setting)]
    refused("train", "pictures", "--data", str(run.parent / "data"), "--out", str(out), *first, *arguments)
    _clear(out)


@pytest.mark.parametrize("verb", ["predict", "eval", "export", "info", "benchmark"])
@bad_inputs
@given(word=WORDS, more=st.lists(WORDS, max_size=2))
def test_random_words_end_in_one_line(run: Path, verb: str, word: str, more: list[str]) -> None:
    place = ("--out", str(run.parent / "out")) if verb in ("predict", "export") else ()
    refused(verb, word, *more, *place)


@pytest.mark.parametrize("verb", ["predict", "export", "benchmark", "eval"])
@bad_inputs
@given(
    option=st.sampled_from(["--region", "--device", "--batch-size", "--format", "--split", "--run", "--json"]),
    value=VALUES,
)
def test_random_options_end_in_one_line(run: Path, verb: str, option: str, value: str) -> None:
    inputs = {"predict": [str(run.parent / "data" / "a")], "benchmark": ["ravlt_tiny"]}.get(verb, [str(run)])
    place = ("--out", str(run.parent / "out")) if verb in ("predict", "export") else ()
    refused(verb, *inputs, option, value, *([value] if option == "--region" else []), *place)


@bad_inputs
@given(
    st.binary(max_size=300), st.sampled_from([".png", ".jpg", ".tif", ".gif", ".webp", ".bmp", ".ppm"]), st.booleans()
)
def test_random_bytes_are_no_pictures(run: Path, body: bytes, ending: str, header: bool) -> None:
    """Also behind the beginning of a good file."""
    place = run.parent / "odd"
    place.mkdir(exist_ok=True)
    path = place / f"x{ending}"
    if header:
        picture = io.BytesIO()
        kind = {".jpg": "JPEG", ".tif": "TIFF", ".ppm": "PPM"}.get(ending, ending[1:].upper())
        Image.new("RGB", (9, 7), "red").save(picture, kind)
        good = bytearray(picture.getvalue())
        start = len(body) % len(good)
        good[start : start + len(body)] = body
        body = bytes(good)
    path.write_bytes(body)
    refused("predict", str(path), "--run", str(run), "--out", str(run.parent / "out"), "--no-explain")
    path.unlink()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@bad_inputs
@given(JSON, st.sampled_from(["", "data_info", "classes", "preprocess", "size"]))
def test_a_run_whose_notes_are_anything_ends_in_one_line(run: Path, anything: Any, place: str) -> None:
    kept = (run / "run.json").read_text()
    notes = json.loads(kept)
    if place == "":
        notes = anything
    elif place == "data_info":
        notes["data_info"] = anything
    elif place == "size":
        notes["data_info"]["preprocess"]["size"] = anything
    else:
        notes["data_info"][place] = anything
    (run / "run.json").write_text(json.dumps(notes))
    try:
        picture = str(run.parent / "data" / "a" / "0.png")
        refused("predict", picture, "--run", str(run), "--out", str(run.parent / "out"), "--no-explain")
        refused("export", str(run), "--out", str(run.parent / "x.onnx")) if place == "size" else None
    finally:
        (run / "run.json").write_text(kept)


def _clear(folder: Path) -> None:
    for path in _files(folder):
        path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*"), reverse=True) if path.is_file())
