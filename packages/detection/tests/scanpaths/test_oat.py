"""OAT against a plain network written from its equations, its table of positions, and what it refuses."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import weights
from detection.models import SCANPATHS
from detection.scanpaths.oat import COMPUTED, KEY_MAP, OAT, load_official, position_table, steps_table
from detection.scanpaths.searchers import decode, grid_cells

SMALL: dict[str, Any] = {"crop_size": (30, 41), "dim": 48, "ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
ROWS, COLUMNS, P = 2, 3, 6


def small(**options: Any) -> Any:
    """A shelf of 2 × 3 objects; all numbers of one size, so that each counts."""
    net = OAT(ROWS, COLUMNS, **{**SMALL, **options}).double().eval()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        offset = 1.0 if re.search(r"norm\d\.weight", name) else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return net


def shelf(net: OAT, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    crops = torch.rand(batch, P, 3, *net.crop_size, dtype=torch.float64)
    return crops, torch.tensor([4, 0][:batch]), torch.tensor([[1, 1, 4, 5], [3, 0, 2, 2]][:batch])


# Whole: one shelf from its crops to its scores; the parts share the state dict.
def plain(
    net: OAT, crops: Tensor, target: int, path: list[int], state: dict[str, Tensor], *, pyramid: int = 0
) -> Tensor:
    """One shelf, token by token and head by head: (P, 3, Y, X) → (T + 1, P + 2)."""
    heads, dim = 4, 48

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(name: str, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        weight, bias = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (y @ w.T + b for y, w, b in zip((x, memory, memory), weight, bias, strict=True))
        out = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(dim // heads)
            if causal:
                for step in range(len(x)):
                    scores[step, step + 1 :] = -torch.inf
            out.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v[:, part])
        return linear(f"{name}.out_proj", torch.cat(out, 1))

    def feed(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}.linear2", linear(f"{name}.linear1", x).clamp(min=0))

    def crop(picture: Tensor) -> Tensor:
        x = F.conv2d(picture[None], state["crops.conv1.weight"], state["crops.conv1.bias"]).clamp(min=0)
        x = x[:, :, : x.shape[2] // 5 * 5, : x.shape[3] // 5 * 5].unfold(2, 5, 5).unfold(3, 5, 5).amax((4, 5))
        x = F.conv2d(x, state["crops.conv2.weight"], state["crops.conv2.bias"]).clamp(min=0)
        if not pyramid:
            x = x[:, :, : x.shape[2] // 3 * 3, : x.shape[3] // 3 * 3].unfold(2, 3, 3).unfold(3, 3, 3).amax((4, 5))
            return linear("crops.linear", x.flatten())
        parts = []
        for level in range(pyramid):
            sides = []
            for side in x.shape[2:]:  # windows that overhang the map by half of what is missing on each side
                window = math.ceil(side / 2**level)
                first = -((window * 2**level - side) // 2)
                sides.append([(max(first + i * window, 0), first + (i + 1) * window) for i in range(2**level)])
            pooled = torch.zeros(32, 2**level, 2**level, dtype=x.dtype)
            for i, (top, bottom) in enumerate(sides[0]):
                for j, (left, right) in enumerate(sides[1]):
                    cut = x[0, :, top : max(bottom, 0), left : max(right, 0)]
                    pooled[:, i, j] = cut.amax((1, 2)) if cut.numel() else 0.0
            parts.append(pooled.flatten())
        return linear("crops.linear", torch.cat(parts))

    def position(row: int, column: int, mark: int) -> Tensor:
        table = net.table.double()
        return torch.cat([table[row], table[column], table[mark]])[: dim // 2]

    def token(place: int, mark: int) -> Tensor:
        return torch.cat([crop(crops[place]), position(place // COLUMNS, place % COLUMNS, mark)])

    memory = torch.stack([*(token(place, 0) for place in range(P)), token(target, 1)])
    for layer in range(2):
        name = f"encoder.layers.{layer}"
        memory = norm(f"{name}.norm1", memory + attend(f"{name}.self_attn", memory, memory))
        memory = norm(f"{name}.norm2", memory + feed(name, memory))
    start = torch.cat([crop(torch.ones_like(crops[0])), position(ROWS // 2, COLUMNS // 2, 0)])
    x = torch.stack([start, *(token(place, int(place == target)) for place in path)])
    for step in range(len(x)):
        for i in range(0, dim, 2):
            angle = step / 10000 ** (i / dim)
            x[step, i] += math.sin(angle)
            x[step, i + 1] += math.cos(angle)
    for layer in range(2):
        name = f"decoder.layers.{layer}"
        x = norm(f"{name}.norm1", x + attend(f"{name}.self_attn", x, x, causal=True))
        x = norm(f"{name}.norm2", x + attend(f"{name}.multihead_attn", x, memory))
        x = norm(f"{name}.norm3", x + feed(name, x))
    if net.readout == "classes":
        return linear("generator", x)
    scores = torch.zeros(len(x), P + 2, dtype=x.dtype)
    scores[:, P + 1] = state["heads.bias"]
    for i in range(P + 1):
        for head in range(2):
            fit = linear(f"attentions.{head}.step", x) @ linear(f"attentions.{head}.object", memory[i]) / math.sqrt(dim)
            scores[:, i] = scores[:, i] + fit * state["heads.weight"][0, head]
        scores[:, i] = scores[:, i] + state["heads.bias"]
    return scores


@pytest.mark.parametrize("options", [{}, {"readout": "classes", "pyramid": 3}])
def test_scores_and_gradients_equal_the_plain_network(options: dict[str, Any]) -> None:
    net = small(**options)
    crops, target, path = shelf(net)
    crops.requires_grad_()
    state = dict(net.named_parameters())
    ours = net(crops, target, path)
    expected = torch.stack([
        plain(net, crops[b], int(target[b]), path[b].tolist(), state, pyramid=options.get("pyramid", 0))
        for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-8)  # sines of the steps are float32, as published
    assert expected.std() > 0.1
    weight = torch.randn_like(expected)
    leaves = [crops, *(p for p in state.values() if p.requires_grad)]
    grads = [torch.autograd.grad((scores * weight).sum(), leaves) for scores in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
    assert all(grad.abs().max() > 0 for grad in grads[0])


@pytest.mark.parametrize("pyramid", [2, 4])
def test_pyramids_are_as_long_as_published(pyramid: Any) -> None:
    net = OAT(1, 2, crop_size=(33, 25), pyramid=pyramid, dim=24, encoder_layers=1, decoder_layers=1, ffn_dim=8)
    assert net.crops.linear.in_features == {2: 160, 4: 2720}[pyramid]
    assert net(torch.rand(1, 2, 3, 33, 25), torch.tensor([1]), torch.zeros(1, 0, dtype=torch.long)).shape == (1, 1, 4)


def test_parameters_are_the_published_number() -> None:
    net = SCANPATHS.create("oat_amazon")
    assert sum(p.numel() for p in net.parameters()) == 18_300_985
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert parts["encoder"] == 6_311_936
    assert parts["decoder"] == 10_518_528
    assert parts["crops"] == 374_752
    assert parts["attentions"] == 1_050_624
    assert parts["generator"] + parts["position_linear"] == 45_142
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert frozen == 45_142


def test_official_checkpoints_load_and_what_is_missing_is_named(tmp_path: Path) -> None:
    source, target = OAT(ROWS, COLUMNS, **SMALL), OAT(ROWS, COLUMNS, **SMALL)
    source_state = source.state_dict()
    official = {new: source_state[own] for new, own in weights.official_names(source, KEY_MAP["official"]).items()}
    assert {"cnn_embedding.cnn1.0.weight", "cnn_embedding.fc.bias", "transformer_encoder.layers.1.norm2.weight",
            "transformer_decoder.layers.0.multihead_attn.in_proj_bias", "cross_attentions.1.decode_fc.weight",
            "cross_attentions.0.encode_fc.bias", "readout.weight", "generator.bias",
            "LinearEmbedding.weight"} <= set(official)  # fmt: skip
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {**{f"model.{k}": v for k, v in official.items()},
                               f"model.{COMPUTED[0]}": torch.zeros(5000, 1, 48)}}, file)  # fmt: skip
    load_official(target, file)
    target_state = target.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(target_state[name], value)
    with pytest.raises(ValueError, match=r"missing readout\.bias"):
        load_official(target, {k: v for k, v in official.items() if k != "readout.bias"})


def test_the_table_has_the_cosines_and_equal_lengths() -> None:
    for sigma, rows in ((1.5, 14), (2.0, 14), (4.0, 40)):
        steps = torch.arange(float(rows))
        table = position_table(rows, 86, sigma=sigma)
        assert table.shape == (rows, 86)
        unit = F.normalize(table, dim=1)
        torch.testing.assert_close(
            unit @ unit.T, torch.exp(-((steps[:, None] - steps) ** 2) / (2 * sigma**2)), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(table.norm(dim=1), torch.full((rows,), 8.764))
    assert position_table(3, 5, norm=2.0).norm(dim=1).tolist() == pytest.approx([2, 2, 2])
    first = F.cosine_similarity(position_table(14, 86)[:1], position_table(14, 86))
    assert first[:5].tolist() == pytest.approx([1, 0.883, 0.607, 0.325, 0.135], abs=1e-3)
    third = [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]
    assert steps_table(3, 4, torch.zeros(1))[2].tolist() == pytest.approx(third)


def test_a_table_of_ones_own_is_used_and_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(5, 8))
    np.save(tmp_path / "pe.npy", table)
    net: Any = OAT(ROWS, COLUMNS, **SMALL, table=tmp_path / "pe.npy")
    assert np.allclose(net.table.numpy(), table)
    assert "table" not in net.state_dict()
    other: Any = OAT(ROWS, COLUMNS, **SMALL, sigma=1.5)
    assert not torch.equal(other.table, OAT(ROWS, COLUMNS, **SMALL).table)


def test_objects_have_no_order_but_their_cells() -> None:
    net = small()
    crops, target, path = shelf(net)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    back = order.argsort()
    cells = grid_cells(ROWS, COLUMNS).expand(2, -1, -1)
    moved = net(crops[:, order], back[target], back[path], cells[:, order])
    expected = net(crops, target, path)
    torch.testing.assert_close(moved[..., back], expected[..., :P], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(moved[..., P:], expected[..., P:], rtol=1e-9, atol=1e-11)


def test_padding_and_what_comes_later_change_nothing_before() -> None:
    net = small()
    crops, target, path = shelf(net)
    whole = net(crops, target, path)
    cut = torch.cat([path[:, :2], torch.full((2, 2), -1)], 1)
    torch.testing.assert_close(net(crops, target, cut)[:, :3], whole[:, :3], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(net(crops[:1], target[:1], path[:1]), whole[:1], rtol=1e-9, atol=1e-11)
    assert net(crops, target, path[:, :0]).shape == (2, 1, P + 2)
    assert net(crops[:0], target[:0], path[:0]).shape == (0, 5, P + 2)


def test_dropout_acts_in_training_alone_and_heads_are_as_many_as_asked_for() -> None:
    net = small(dropout=0.5)
    crops, target, path = shelf(net)
    assert torch.equal(net(crops, target, path), net(crops, target, path))
    assert not torch.equal(net.train()(crops, target, path), net(crops, target, path))
    for heads in (1, 3):
        other = small(score_heads=heads)
        assert len(other.attentions) == heads
        assert other(crops, target, path).shape == (2, 5, P + 2)
    single = small(score_heads=1)
    assert (single(crops, target, path)[..., -1] == 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        half = small().float()(crops.float(), target, path)
    torch.testing.assert_close(half.double(), small()(crops, target, path), rtol=0.1, atol=0.1)


def test_the_decoded_path_is_that_of_whole_forward_passes_and_ends_at_end() -> None:
    net = small()
    net.heads.weight.data *= 4
    crops, target, _ = shelf(net)
    for b in range(2):
        path: list[int] = []
        while len(path) < 4:
            scores = net(crops[b : b + 1], target[b : b + 1], torch.tensor([path], dtype=torch.long).view(1, -1))[0, -1]
            best = int(scores[: P if not path else P + 1].argmax())
            if best == P:
                break
            path.append(best)
        assert decode(net, net.encode(crops, target), max_length=4)[b] == path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows and columns must be at least 1, got 0 and 3"),
        ({"dim": 46}, "dim must be even and a multiple of num_heads=4, got dim=46"),
        ({"dim": 12}, "position_table: rows must be 1…2, the width, got rows=3; use a larger dim"),
        ({"pyramid": 1}, "pyramid must be 0, 2, 3 or 4, got pyramid=1"),
        ({"readout": "all"}, "readout must be 'objects' or 'classes', got readout='all'"),
        ({"score_heads": 0}, "score_heads must be at least 1, got score_heads=0"),
        ({"crop_size": (28, 40)}, "crop_size must be at least 29×29, got crop_size=(28, 40)"),
        ({"crop_size": (18, 40), "pyramid": 2}, "crop_size must be at least 19×19, got crop_size=(18, 40)"),
        ({"sigma": 0.0}, "sigma must be in (0, 4] rows, got sigma=0.0"),
        ({"table": torch.zeros(2, 8)}, "table must be (3 or more, 8), got (2, 8)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        OAT(**{"rows": ROWS, "columns": COLUMNS, **SMALL, **options})


def test_inputs_that_do_not_fit_are_named() -> None:
    net = small()
    crops, target, path = shelf(net)
    for inputs, message in (
        ((crops[:, :5], target, path), "crops must be (B, 6, 3, 30, 41), got (2, 5, 3, 30, 41)"),
        ((crops, torch.tensor([6, 0]), path), "target must be (2,) objects in 0…5, got [6, 0]"),
        ((crops, target, path + 3), "path must be (2, T) objects in 0…5 or -1, got (2, 4)"),
        ((crops, target, path, torch.full((2, P, 2), 3)), "cells must be (2, 6, 2) numbers in 0…2, got (2, 6, 2)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            net(*inputs)


def test_the_transformer_is_as_deep_and_wide_as_asked_for() -> None:
    net: Any = OAT(ROWS, COLUMNS, **{**SMALL, "num_heads": 6, "ffn_dim": 10, "encoder_layers": 3, "decoder_layers": 1})
    assert [len(net.encoder.layers), len(net.decoder.layers)] == [3, 1]
    assert net.encoder.layers[0].self_attn.num_heads == net.decoder.layers[0].multihead_attn.num_heads == 6
    assert net.decoder.layers[0].linear1.out_features == net.encoder.layers[2].linear1.out_features == 10


def test_every_used_parameter_learns() -> None:
    net: Any = SCANPATHS.create("test_oat")
    scores = net(torch.rand(2, 6, 3, 29, 34), torch.tensor([1, 2]), torch.tensor([[0, 1], [2, -1]]))
    F.cross_entropy(scores.flatten(0, 1), torch.tensor([0, 1, 6, 2, 6, 3])).backward()
    still = [
        n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert still == []
    assert isinstance(net, nn.Module)
