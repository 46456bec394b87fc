"""Official weights: files and dicts unwrapped, renamed, and accounted for name by name."""

from pathlib import Path

import pytest
import torch
from torch import nn

from attn_core import weights

KEY_MAP = {"paper": ((r"^first\.", "stem.conv."),)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = {name.replace("first.", "stem.conv."): value for name, value in Net().state_dict().items()}
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def load(source: object, **options: object) -> Net:
    checkpoint = weights.read(source)  # type: ignore[arg-type]
    net = Net()
    return weights.fill(net, checkpoint, weights.fitting_names(net, KEY_MAP, checkpoint), **options)  # type: ignore[arg-type]


WRAPPED = {
    "bare": lambda state: state,
    "training state": lambda state: {"model": state, "epoch": 3},
    "lightning": lambda state: {"state_dict": state},
    "distilled, distributed": lambda state: {"teacher": {f"module.{name}": value for name, value in state.items()}},
    "a detector's": lambda state: {
        "state_dict": {f"backbone.{name}": value for name, value in state.items()} | {"neck.weight": torch.ones(1)}
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", None])
def test_every_wrapping_and_kind_of_file_gives_the_official_values(official, wrap, suffix, tmp_path: Path) -> None:
    source = wrap(official)
    if suffix == ".pth":
        torch.save(source, tmp_path / "a.pth")
        source = tmp_path / "a.pth"
    elif suffix == ".safetensors":
        from safetensors.torch import save_file

        flat = source
        while not all(isinstance(value, torch.Tensor) for value in flat.values()):
            flat = next(value for value in flat.values() if isinstance(value, dict))
        save_file({name: value.clone() for name, value in flat.items()}, tmp_path / "a.safetensors")
        source = str(tmp_path / "a.safetensors")
    net = load(source)
    torch.testing.assert_close(net.first.weight, official["stem.conv.weight"])
    torch.testing.assert_close(net.head.bias, official["head.bias"])


def test_our_own_names_and_1x1_convolutions_are_read(official) -> None:
    state = load(official).state_dict()
    state["first.weight"] = state["first.weight"][:, :, None, None]
    torch.testing.assert_close(load(state).first.weight, official["stem.conv.weight"])


def test_averaged_weights_are_taken_only_when_asked_for(official) -> None:
    averaged = {name: value + 1 for name, value in official.items()}
    both = {"model": official, "model_ema": averaged}
    torch.testing.assert_close(weights.read(both, ema=True).tensors["head.bias"], official["head.bias"] + 1)
    torch.testing.assert_close(weights.read(both).tensors["head.bias"], official["head.bias"])
    with pytest.raises(ValueError, match="the given dict has no averaged weights under any of model_ema"):
        weights.read({"model": official}, ema=True)


def test_all_problems_stand_in_one_message_and_nothing_is_copied(official) -> None:
    official["stem.conv.weigth"] = official.pop("stem.conv.weight")
    official["head.weight"] = torch.zeros(5, 4)
    net, before = Net(), Net().state_dict()
    net.load_state_dict(before)
    checkpoint = weights.read(official)
    message = (
        r"the given dict does not fit this Net: missing stem.conv.weight \(there is stem.conv.weigth\); "
        r"unexpected stem.conv.weigth; head.weight is \(5, 4\), the model has \(2, 4\)$"
    )
    with pytest.raises(ValueError, match=message):
        weights.fill(net, checkpoint, weights.fitting_names(net, KEY_MAP, checkpoint))
    torch.testing.assert_close(net.state_dict(), before)


def test_ignored_beginnings_keep_the_models_own_values(official) -> None:
    official["head.weight"] = torch.zeros(5, 4)
    del official["head.bias"]
    official["head.extra"] = torch.zeros(1)
    net = load(official, ignore=("head",))
    torch.testing.assert_close(net.first.weight, official["stem.conv.weight"])
    assert net.head.weight.shape == (2, 4)


def test_a_function_of_names_leaves_out_what_it_maps_to_none(official) -> None:
    official["optimizer.step"] = torch.zeros(1)
    net = weights.fill(
        Net(),
        weights.read(official),
        lambda name: None if name.startswith("optimizer") else name.replace("stem.conv", "first"),
    )
    torch.testing.assert_close(net.first.bias, official["stem.conv.bias"])


def test_tables_are_fitted_before_they_are_compared(official) -> None:
    official["head.weight"] = official["head.weight"].repeat_interleave(2, 0)
    net = load(official, fit=lambda name, value: value[::2] if name == "head.weight" else value)
    torch.testing.assert_close(net.head.weight, official["head.weight"][::2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "not a checkpoint that loads safely"),
        (b"PK\x03\x04 broken", "not a checkpoint that loads safely"),
        ({"epoch": 3}, "holds no weights, only epoch"),
        ([1], "holds a list, not a dict of weights"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint_is_named(content, message: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"bad{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
        message = message if suffix == ".pth" else "not a checkpoint that loads safely"
    with pytest.raises(ValueError, match=rf"^load_official: .*bad{suffix}.*{message}"):
        weights.read(file)


def test_unsafe_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"model": Net()}, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="not a checkpoint that loads safely"):
        weights.read(tmp_path / "whole.pth")


def test_hub_names_are_explained() -> None:
    with pytest.raises(ValueError, match=r"expected hf://owner/repo/file, got 'hf://owner'"):
        weights.local_file("hf://owner")
    with pytest.raises(ValueError, match=r"owner/name does not exist; for the hub write hf://owner/name/<file>"):
        weights.local_file("owner/name")
