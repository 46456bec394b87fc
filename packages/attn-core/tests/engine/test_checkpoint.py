"""Damaged, hostile and foreign checkpoints are named and refused; the next older one is taken."""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from attn_core.engine import CheckpointError
from attn_core.engine.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_intact,
    open_checkpoint,
    read_plain,
    to_plain,
    write_checkpoint,
)


def _model(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with step_10 and step_20."""
    for step in (10, 20):
        state = {"step": step, "optimizer": {"state": {0: {"exp_avg": torch.randn(4)}}}, "lr": (0.1, None)}
        write_checkpoint(tmp_path, f"step_{step}", _model().state_dict(), state, {"step": step})
    return tmp_path


def _resumed(run: Path) -> tuple[str | None, str]:
    checkpoint, skipped = newest_intact(run, readable=lambda found: found.read_state())
    return checkpoint.name if checkpoint else None, "\n".join(skipped)


def test_the_newest_intact_checkpoint_is_taken(run):
    assert _resumed(run) == ("step_20", "")
    assert open_checkpoint(run, "step_20").read_state()["lr"] == (0.1, None)


def test_a_truncated_weights_file_is_named_with_its_sizes(run):
    path = run / "step_20.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 16)
    name, reason = _resumed(run)
    assert name == "step_10"
    assert reason == (
        f"load_checkpoint: {path} is {size - 16:,} bytes, its header promises {size:,}: the file is truncated; "
        "the previous checkpoint is step_10"
    )
    with pytest.raises(CheckpointError, match="the file is truncated"):
        load_checkpoint(path, _model())


@pytest.mark.parametrize("size", [0, 5, 30])
def test_a_file_cut_inside_its_header_is_truncated(run, size):
    os.truncate(run / "step_20.safetensors", size)
    name, reason = _resumed(run)
    assert name == "step_10"
    assert f"is {size} bytes, its header promises" in reason


def test_a_truncated_state_file_is_named_with_its_sizes(run):
    path = run / "step_20.state.pt"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    name, reason = _resumed(run)
    assert name == "step_10"
    assert f"{path} is {size // 2:,} bytes, its manifest promises {size:,}: the file is truncated" in reason


@pytest.mark.parametrize("file", ["step_20.safetensors", "step_20.state.pt", "step_20.json"])
def test_no_flipped_byte_is_accepted(run, file):
    path = run / file
    original = path.read_bytes()
    for position in range(0, len(original), max(1, len(original) // 40)):
        path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
        name, reason = _resumed(run)
        assert name == "step_10", f"byte {position} of {file}"
        assert re.search(r"was altered: its sha256|cannot be read as a manifest|truncated|is missing", reason), reason
    path.write_bytes(original)
    assert _resumed(run)[0] == "step_20"


def test_without_an_intact_checkpoint_nothing_is_chosen(run):
    for name in list_checkpoints(run):
        (run / f"{name}.safetensors").unlink()
    name, reason = _resumed(run)
    assert name is None
    assert "step_20.safetensors is missing; the previous checkpoint is step_10" in reason
    assert "step_10.safetensors is missing; there is no other" in reason
    with pytest.raises(CheckpointError, match=r"step_20.safetensors is missing"):
        load_checkpoint(run, _model())


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_bomb_with_a_matching_manifest_is_refused_unexecuted(run, form, tmp_path):
    bomb, path = tmp_path / "exploded", run / "step_20.state.pt"
    if form == "torch":
        torch.save({"step": 20, "payload": _Bomb(bomb)}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps({"step": 20, "payload": _Bomb(bomb)}, protocol=2))
    import hashlib

    from attn_core.engine.checkpoint import _manifest_hash

    manifest = json.loads((run / "step_20.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["sha256"] = _manifest_hash(manifest)
    (run / "step_20.json").write_text(json.dumps(manifest))
    open_checkpoint(run, "step_20")  # sizes and hashes are right

    with pytest.raises(CheckpointError, match=r"holds Python objects \(\w+\.mkdir\).*nothing in it was executed"):
        read_plain(path)
    assert _resumed(run)[0] == "step_10"
    assert not bomb.exists()


def test_a_checkpoint_of_another_model_lists_what_differs(run):
    model = _model(width=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = (
        r"step_20.safetensors belongs to another model; tensors: 3 of another shape \(0.weight \(3, 4\) instead of"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(run, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    names = r"8 missing \(weight_ih_l0, weight_hh_l0.*, \.\.\.\), 4 unexpected \(0.bias, 0.weight, 1.bias, 1.weight\)"
    with pytest.raises(CheckpointError, match=names):
        load_checkpoint(run / "step_20.safetensors", nn.LSTM(4, 4, num_layers=2))


def test_loading_copies_the_weights(run):
    model = _model()
    load_checkpoint(run, model)
    assert torch.equal(model.get_parameter("1.weight"), load_file(run / "step_20.safetensors")["1.weight"])


def test_tied_and_strided_weights_survive(tmp_path):
    weight = torch.randn(6, 4)
    tensors = {"a": weight, "tied": weight, "view": weight.T, "part": weight[:2]}
    found = write_checkpoint(tmp_path, "step_1", tensors, None, {"step": 1}).read_weights()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_state_that_is_not_plain_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"state.hooks\[1\].rule is a function; a checkpoint holds tensors"):
        write_checkpoint(tmp_path, "step_1", {}, {"hooks": [0, {"rule": lambda: 0}]}, {"step": 1})
    assert not list(tmp_path.iterdir())


def test_numpy_values_become_plain_ones():
    plain = to_plain({"scalar": np.float64(0.5), "array": np.arange(3), "nested": (np.int64(2), [True, "x"])})
    assert type(plain["scalar"]) is float
    assert torch.equal(plain["array"], torch.arange(3))
    assert plain["nested"] == (2, [True, "x"])


def test_weights_in_a_torch_file_load_without_executing(tmp_path):
    model = _model()
    torch.save({"model": _model().state_dict()}, tmp_path / "official.pth")
    load_checkpoint(tmp_path / "official.pth", model)
    torch.save({"model": _Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="refused and nothing in it was executed"):
        load_checkpoint(tmp_path / "bomb.pth", model)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "noise.pth").write_bytes(b"\x00noise" * 9)
    with pytest.raises(CheckpointError, match=r"noise.pth"):
        load_checkpoint(tmp_path / "noise.pth", model)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pth", model)
