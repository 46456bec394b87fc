"""``vlm-tools verbalize``: maps and attributions in words, each option, and one line for each bad file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Command = Callable[..., int]
TOKENS = ["a", "truly", "great", "film", "in", "every", "way", "not", "bad"]
SCORES = [0.0, 0.5, 0.9, 0.05, 0.0, 0.0, 0.0, -0.8, -0.7]


def test_maps_and_attributions_are_said_in_words(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges = np.linspace(0, 1, 5)
    boxes = np.array([(x, y, x + 0.25, y + 0.25) for y in edges[:4] for x in edges[:4]])
    heat = np.full((2, 16), 0.01)
    heat[0, [0, 1, 4, 5]], heat[1, 15] = 1.0, 1.0
    np.savez(tmp_path / "map.npz", heat=heat, boxes=boxes, words=np.array(["three", " "]))
    np.savez(tmp_path / "one.npz", heat=heat[1], boxes=boxes)
    assert command("verbalize", str(tmp_path / "map.npz")) == 0
    assert capsys.readouterr().out.startswith("three: upper left quarter, 97 % of the relevance on 25 % of the area")
    assert command("verbalize", str(tmp_path / "one.npz"), "--most", "1") == 0
    assert capsys.readouterr().out.startswith("lower right corner, ")
    record = {"tokens": TOKENS, "attributions": SCORES}
    (tmp_path / "text.json").write_text(json.dumps(record))
    (tmp_path / "texts.jsonl").write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    said = []
    for options in ([], ["--official"], ["--sign", "-"]):
        assert command("verbalize", str(tmp_path / "text.json"), *options) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith('Most relevant: "truly great')
    assert said[1] != said[0]
    for options in (["--width", "9"], ["--metric", "quantile"], ["--value", "1.7"]):
        assert command("verbalize", str(tmp_path / "text.json"), *options) == int(options[0] == "--value")
    assert "at most 1 for the mean" in capsys.readouterr().err
    assert said[2].startswith('Most against it: "not bad" (100 %)')
    assert command("verbalize", str(tmp_path / "texts.jsonl")) == 0
    assert capsys.readouterr().out == 2 * said[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"", "no map of explain or ground"),
        ("a.npz", b"PK", "no map of explain or ground"),
        ("a.json", b"{", "no JSON"),
        ("a.json", b"[]", "there is no record"),
        ("a.json", b"[3]", "record 0 needs tokens"),
        ("a.json", b'{"tokens": [1], "attributions": [1]}', "record 0 needs tokens"),
        ("a.json", b'{"tokens": ["a"], "attributions": [null]}', "record 0 needs tokens"),
        ("a.json", b'{"tokens": ["a"], "attributions": [1, 2]}', "1 tokens need as many attributions"),
        ("a.json", b'{"tokens": ["a"], "attributions": [1e999]}', "one list of finite numbers"),
        ("a.json", b"\xff\xfe\x00", "neither an .npz nor a text in UTF-8"),
    ],
)
def test_bad_files_are_named(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert command("verbalize", str(tmp_path / name)) == 1
    assert message in capsys.readouterr().err


def test_maps_whose_parts_do_not_fit_are_named(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", heat=np.ones(4), boxes=np.ones((3, 4)))
    assert command("verbalize", str(tmp_path / "a.npz")) == 1
    assert "heat (1, 4) and boxes (3, 4) do not fit" in capsys.readouterr().err
