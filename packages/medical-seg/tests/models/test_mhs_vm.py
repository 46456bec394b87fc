"""MHS-VM against a plain network with a loop over tokens: heads, routes, fusion; official names."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medical_seg.layers.state_space.multi_head import RouteFusion
from medical_seg.layers.state_space.routes import route_pair
from medical_seg.models import create_model, load_official
from medical_seg.models.mhs_vm import MHSVM

_spec: Any = importlib.util.spec_from_file_location("plain_vm_unet", Path(__file__).with_name("test_vm_unet.py"))
plain: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)


def plain_fusion(walks: list[Tensor], threshold: float) -> Tensor:
    """By the equation, with the deviation of a sample."""
    mean = sum(walks) / 4
    deviation = (sum((y - mean) ** 2 for y in walks) / 3) ** 0.5
    least = torch.minimum(torch.minimum(walks[0], walks[1]), torch.minimum(walks[2], walks[3]))
    variation = deviation / (sum(y - least for y in walks) / 4 + 1e-5)
    return sum(walks) * torch.clamp(variation - threshold, min=0)


def plain_gate(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """One block's branch; heads one after the other, routes one after the other."""
    inner, gate = (x @ state["in_proj.weight"].T).chunk(2, -1)
    inner = plain.convolved(state, inner)
    batch, height, width, _ = inner.shape
    scan = plain.part(state, "mhs")
    heads = [pattern for pattern in "CXSZ" if f"scanhead_{pattern}.mambaeng.Ds" in scan]
    parts = (inner @ scan["x_ssproj.weight"].T).chunk(len(heads), -1)
    found = []
    for pattern, tokens in zip(heads, parts, strict=True):
        own = plain.part(scan, f"scanhead_{pattern}.mambaeng")
        flat, walks = tokens.reshape(batch, height * width, -1), []
        for number, order in enumerate(route_pair(pattern, height, width)):
            order = torch.from_numpy(order.copy())
            there = plain.walk(own, 2 * number, flat[:, order])
            back = plain.walk(own, 2 * number + 1, flat[:, order].flip(1)).flip(1)
            for sequence in (there, back):
                placed = torch.zeros_like(sequence)
                placed[:, order] = sequence
                walks.append(placed)
        found.append(plain_fusion(walks, float(scan["fusion.t"])))
    joined = plain.norm(scan, "cat_norm", torch.cat(found, -1)) @ scan["y_proj.weight"].T
    return plain.norm(state, "out_norm", joined.view(batch, height, width, -1)) * F.silu(gate)


@pytest.mark.parametrize(("heads", "threshold"), [(3, 0.5), (4, 0.0)])
def test_outputs_and_gradients_equal_the_plain_network(heads: int, threshold: float) -> None:
    model = plain.stirred("test_mhs_vm", in_channels=2, out_channels=3, heads=heads, threshold=threshold)
    plain.assert_equal_with_gradients(model, torch.randn(2, 2, 16, 24, dtype=torch.float64), plain_gate, 2)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mhs_vm_3h", 17_386_153),
        ("mhs_vm_3h_deep", 27_208_105),
        ("mhs_vm", 17_257_129),
        ("mhs_vm_deep", 26_993_065),
    ],
)
def test_parameters_of_all_depths_and_heads(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == count


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_fusion_is_the_equation(threshold: float) -> None:
    walks = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64) * 3
    found = RouteFusion(threshold).double()(walks)
    assert torch.allclose(found, plain_fusion(list(walks.unbind(2)), threshold), atol=1e-12)


def test_equal_walks_give_nothing_and_a_finite_gradient() -> None:
    walks = torch.ones(1, 1, 4, 2, 2, requires_grad=True)
    found = RouteFusion(0.0)(walks)
    found.sum().backward()
    assert found.abs().max() == 0
    assert torch.isfinite(walks.grad).all()  # type: ignore[arg-type]


def test_the_threshold_travels_with_the_weights() -> None:
    source, other = plain.stirred("test_mhs_vm", threshold=0.4), plain.stirred("test_mhs_vm", threshold=0.0)
    other.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 16, 8, dtype=torch.float64)
    assert torch.equal(other.eval()(x), source.eval()(x))
    thresholds = [value.item() for name, value in other.state_dict().items() if name.endswith("fusion.t")]
    assert thresholds == pytest.approx([0.4] * 4)


def test_official_checkpoints_hold_names_twice_and_no_threshold(tmp_path: Path) -> None:
    source = plain.stirred("test_mhs_vm")
    official: dict[str, Tensor] = {}
    for name, value in source.state_dict().items():
        if name.endswith("fusion.t"):
            continue
        official[f"vmunet.{name}"] = value
        if ".mambaeng." in name:
            official[f"vmunet.{name.replace('.mambaeng.', '.scanning.seq2seq_engine.')}"] = value
        if name.endswith("x_ssproj.weight"):
            official[f"vmunet.{name.removesuffix('.weight')}_W"] = value
    assert "vmunet.layers.0.blocks.0.self_attention.mhs.scanhead_Z.scanning.seq2seq_engine.A_logs" in official
    torch.save(official, tmp_path / "best_4h.pth")
    model = load_official(plain.stirred("test_mhs_vm", threshold=0.25), tmp_path / "best_4h.pth")
    model_state = model.state_dict()
    for name, value in source.state_dict().items():
        mine = model_state[name]
        assert float(mine) == 0.25 if name.endswith("fusion.t") else torch.equal(mine, value)
    with pytest.raises(ValueError, match=r"does not fit this MHSVM: unexpected .*scanhead_Z"):
        load_official(plain.stirred("test_mhs_vm", heads=3, width=24), tmp_path / "best_4h.pth")


def test_the_deep_network_of_four_heads_has_the_official_number_of_entries() -> None:
    with torch.device("meta"):
        names = [name for name in create_model("mhs_vm_deep").state_dict() if not name.endswith("fusion.t")]
    twice = sum(".mambaeng." in name or name.endswith("x_ssproj.weight") for name in names)
    assert len(names) + twice == 1587


def test_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="MHSVM: heads must be 3 or 4, got heads=5"):
        MHSVM(heads=5)


def test_convert_weights_finds_the_sizes_of_a_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    from attn_core.testing.commands import answer
    from medical_seg.cli import CLI

    source, target = tmp_path / "best_3h.pth", tmp_path / "new.safetensors"
    state = create_model("test_mhs_vm", heads=3, width=24, depths=(1, 2), depths_up=(2, 1), out_channels=2).state_dict()
    torch.save({f"vmunet.{name}": value for name, value in state.items() if not name.endswith("fusion.t")}, source)
    found = answer(CLI, "convert-weights", str(source), str(target), "--arch", "mhs_vm", "--threshold", "0.25")
    assert found.code == 0, found.lines
    with safe_open(target, "pt") as file:
        about = file.metadata()
        assert {name: about[name] for name in ("heads", "width", "depths", "depths_up", "states", "threshold")} == {
            "heads": "3", "width": "24", "depths": "(1, 2)", "depths_up": "(2, 1)", "states": "4", "threshold": "0.25",
        }  # fmt: skip
        assert torch.equal(file.get_tensor("final_conv.weight"), state["final_conv.weight"])
    assert "--option 'heads=3'" in found.printed
    torch.save({"x": torch.zeros(2)}, source)
    for arch in ("mhs_vm", "vm_unet"):
        refused = answer(CLI, "convert-weights", str(source), str(target), "--arch", arch)
        assert "best_3h.pth: no state dict of the official network" in refused.lines[0]
