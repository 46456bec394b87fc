"""Random bad inputs of every verb: one line and an exit code, never a traceback.

See `attn_core.testing.commands` for how many are drawn.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from attn_core.testing.commands import assert_foreseen, bad_inputs
from vlm_tools.cli import CLI

pytestmark = pytest.mark.filterwarnings("ignore")


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    stored = io.BytesIO()
    Image.new(mode, (width, height)).save(stored, format="PNG")
    return stored.getvalue()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A picture whose bytes are cut or changed."""
    whole = bytearray(
        png(draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from(["L", "RGB", "P", "1"])))
    )
    for _ in range(draw(st.integers(0, 4))):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole[: draw(st.integers(0, len(whole)))])


SHAPES = st.sampled_from([(1, 1), (1, 700), (700, 1), (2, 3), (40, 30)])
PICTURES = damaged() | st.binary(max_size=60) | SHAPES.map(lambda shape: png(*shape))
TEXTS = st.sampled_from(
    ["", " ", "?", "a three", "a giraffe", "in the image is there a two", "猫", "\x00", "-1"]
) | st.text(max_size=12)
NUMBERS = st.sampled_from(
    [
        "-1",
        "0",
        "1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "x",
        "",
        "0.5",
        "9" * 30,
        "null",
        "[]",
        "{}",
        '"a"',
        "true",
        "[1.5]",
        "[99]",
        '{"2": [0]}',
        '{"a": 1}',
        "[" * 2000,
    ]
)
OPTIONS = st.tuples(
    st.sampled_from(["var", "act", "pai", "paint", "vcd", "agla", "logit_boost", "identity", "vra", ""]),
    st.sampled_from(
        [
            "alpha",
            "beta",
            "gamma",
            "plausibility",
            "layers",
            "heads",
            "dims",
            "tau",
            "step",
            "seed",
            "keep",
            "view",
            "threshold",
            "relative",
            "min_rows",
            "strength",
            "head_weights",
            "local_share",
            "x",
            "",
        ]
    ),
    NUMBERS,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["yes", "no", "scene.png"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["question_id", "id", "image", "text", "query", "label", "caption", "objects", "type", "truth", "hallu"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=10,
)
RECORD = st.fixed_dictionaries(
    {
        "question_id": JSON,
        "id": st.just(1) | JSON,
        "image": st.just("scene.png") | JSON,
        "text": TEXTS,
        "query": TEXTS,
        "label": st.just("yes") | JSON,
        "caption": st.text(max_size=9) | JSON,
        "objects": st.just(["dog"]) | JSON,
        "type": st.just("generative") | JSON,
        "truth": st.just(["dog"]) | st.just("yes") | JSON,
    },
    optional={"hallu": JSON},
)
FILES = st.binary(max_size=40) | st.one_of(JSON, st.lists(RECORD, max_size=2), RECORD).map(
    lambda value: json.dumps(value).encode()
)


@st.composite
def calls(draw: st.DrawFn, verb: str) -> tuple[list[str], dict[str, bytes]]:
    """Arguments of a verb, and files that they name."""
    files = {"p.png": draw(PICTURES), "f.json": draw(FILES), "g.json": draw(FILES)}
    place = draw(st.sampled_from(["p.png", "p.png", "scene.png", "missing.png", "", "f.json"]))
    if verb in ("ask", "ground", "explain", "caption", "sinks"):
        words = [] if verb in ("caption", "sinks") else [draw(TEXTS)]
        arguments = [verb, place, *words, "--model", "RUN"]
        if verb in ("ground", "explain"):
            arguments += ["--out", "out", "--reading", draw(st.sampled_from(["attention", "flow", "chefer", "x", ""]))]
        if verb in ("ask", "caption", "explain") and draw(st.booleans()):
            method, name, value = draw(OPTIONS)
            arguments += ["--method", method, "--option", f"{name}={value}"]
        if verb == "sinks":
            arguments += ["--tau", draw(NUMBERS)]
        elif verb != "ground":
            arguments += ["--tokens", draw(st.sampled_from(["1", "2", "0", "x", "99999999999"]))]
        return arguments, files
    if verb == "evaluate":
        kind = draw(st.sampled_from(["pope", "chair", "amber", "x"]))
        arguments = [verb, kind, draw(st.sampled_from(["f.json", "f.json", "missing.json", ""])), "--model", "RUN"]
        for option in ("--images", "--annotations", "--relations", "--synonyms"):
            if draw(st.booleans()):
                arguments += [option, draw(st.sampled_from(["", "f.json", "g.json", "missing"]))]
        return [*arguments, "--tokens", "1"], files
    if verb == "predict":
        return [verb, place, "--run", draw(st.sampled_from(["RUN", "RUN", "missing", "f.json"])), "--out", "out"], files
    if verb == "verbalize":
        option = draw(st.sampled_from(["--width", "--value", "--most", "--metric", "--sign"]))
        return [verb, draw(st.sampled_from(["f.json", "p.png", "n.npz", ""])), f"{option}={draw(NUMBERS)}"], {
            **files, "n.npz": draw(st.binary(max_size=40))
        }  # fmt: skip
    if verb == "agree":
        names = draw(st.lists(st.sampled_from(["attention", "flow", "x", ""]), max_size=2))
        chosen = [part for name in names for part in ("--reading", name)]
        sizes = [f"{option}={draw(NUMBERS)}" for option in ("--steps", "--top-k", "--permutations")]
        return [verb, place, draw(TEXTS), "--model", "RUN", *chosen, *sizes, "--tokens", "1", "--out", "out/a"], files
    if verb == "demo":
        return [
            verb,
            "--run",
            draw(st.sampled_from(["f.json", "g.json/x"])),
            "--scenes",
            draw(NUMBERS),
            "--out",
            "out",
        ], files
    words = st.sampled_from(["var", "", "x", "RUN", "f.json"]) | st.text(max_size=8)
    if verb == "train":
        key = draw(
            st.sampled_from(["steps", "model", "model.net", "train_dataloader.batch_size", "test_evaluator.type"])
        )
        return [verb, "--device", "nosuch", "--out", "new", "--set", f"{key}={draw(NUMBERS)}", "--", draw(words)], files
    if verb == "benchmark":
        option = draw(st.sampled_from(["--tokens", "--after", "--repeats", "--batch-size"]))
        return [verb, f"{option}={draw(NUMBERS)}", "--device", "nosuch", "--", draw(words)], files
    return [verb, "--", draw(words)], files


@pytest.mark.parametrize(
    "verb",
    [
        *("ask", "caption", "ground", "explain", "verbalize", "agree", "sinks", "evaluate", "predict", "demo"),
        *("info", "export", "eval", "benchmark", "train"),
    ],
)
@pytest.mark.usefixtures("picture")
def test_a_bad_input_is_one_line(verb: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @bad_inputs
    @given(st.data())
    def check(data: Any) -> None:
        arguments, files = data.draw(calls(verb))
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        assert_foreseen(CLI, *(str(run) if word == "RUN" else word for word in arguments))

    monkeypatch.chdir(tmp_path)
    check()
