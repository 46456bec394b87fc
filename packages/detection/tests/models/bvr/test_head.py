"""BVR: geometry, attention, keys and targets against slow formulations; parameters of the official model."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.bvr.head import (
    POINT_TYPES,
    BVRHead,
    BVRTransformer,
    KeyAttention,
    KeypointHead,
    Keys,
    RelativeGeometry,
    gaussian_focal_loss,
    gaussian_radius,
    point_targets,
)


def full_embedding(dim: int, base: int) -> Tensor:
    """The sine embedding of every cell of the map, as the paper writes it: (side, side, dim), y before x."""
    side = torch.arange(-(base // 2), base // 2 + 1).float()
    frequency = 1000 ** (4 * torch.arange(dim // 4) / dim)
    wave = torch.cat([(side[:, None] / frequency).sin(), (side[:, None] / frequency).cos()], 1)
    x = wave[None].expand(len(side), -1, -1)
    return torch.cat([x, x.transpose(0, 1)], 2)


def test_separable_table_equals_the_convolution_of_the_whole_map() -> None:
    geometry = RelativeGeometry(8, 256, 400)
    conv: Any = geometry.embedding_transform[0].conv
    whole = torch.einsum("yxc,hc->hyx", full_embedding(256, 400), conv.weight.flatten(1)) + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(geometry.table(), whole, atol=1e-5, rtol=0)
    assert sum(buffer.numel() for buffer in geometry.buffers()) == 401 * 128  # officially 401 · 401 · 256
    assert not [key for key in geometry.state_dict() if "base" in key or "waves" in key]


def test_lookup_reads_a_little_farther_than_the_offset() -> None:
    """401 cells with align_corners=False: 100 units read what stands at 100.25."""
    geometry = RelativeGeometry(2, 8, 400)
    ramp = torch.arange(-200.0, 201).expand(2, 401, 401) + 300
    read = geometry(torch.tensor([100.0, 7.0]).view(1, 1, 1, 2), ramp)
    torch.testing.assert_close(read.exp(), torch.full((1, 2, 1, 1), 400.25), atol=1e-3, rtol=0)
    border = geometry(torch.tensor([1e4, 0.0]).view(1, 1, 1, 2), ramp)
    torch.testing.assert_close(border.exp(), torch.full((1, 2, 1, 1), 500.0), atol=1e-3, rtol=0)
    assert geometry(torch.zeros(1, 1, 1, 2), -ramp).allclose(torch.tensor(1e-6).log())


def slow_transformer(model: BVRTransformer, x: Tensor, cells: Tensor, keys: list[Keys], unit: float) -> Tensor:
    """Scores, geometry and softmax written out, with torch's own multi-head attention."""
    query = x.flatten(2).transpose(1, 2)
    total = query
    for layer, key in zip(model.decoder, keys, strict=True):
        assert isinstance(layer, KeyAttention)
        offsets = (key.positions[:, None] - cells[None, :, None]) / unit
        bias = model.relative_positional_encoding(offsets)
        dim = query.shape[-1]
        peer = nn.MultiheadAttention(dim, layer.num_heads, batch_first=True, dtype=query.dtype)
        peer.load_state_dict(
            {
                "in_proj_weight": layer.in_proj_weight,
                "in_proj_bias": layer.in_proj_bias,
                "out_proj.weight": layer.out_proj.weight,
                "out_proj.bias": layer.out_proj.bias,
            }
        )
        total = total + peer(query, key.features, key.features, attn_mask=bias.flatten(0, 1))[0]
    return F.relu(total).transpose(1, 2).view_as(x)


def random_keys(batch: int, count: int, dim: int) -> Keys:
    return Keys(torch.randn(batch, count, dim), torch.rand(batch, count, 2) * 60, torch.rand(batch, count))


def widened(model: BVRTransformer) -> BVRTransformer:
    """Values of the table in (0, 2): at the start they are so small that all logs are equal."""
    conv = model.relative_positional_encoding.embedding_transform[0].conv
    nn.init.normal_(conv.weight, std=0.1)
    nn.init.ones_(conv.bias)
    for layer in model.decoder:
        nn.init.normal_(layer.get_parameter("in_proj_bias"))
    return model


@pytest.mark.parametrize("sets", [1, 2])
def test_transformer_equals_multi_head_attention_with_bias(sets: int) -> None:
    model = widened(BVRTransformer(32, 4, sets))
    maps = [torch.randn(2, 32, 4, 5), torch.randn(2, 32, 1, 3)]
    cells = [torch.rand(20, 2) * 60, torch.rand(3, 2) * 60]
    keys = [random_keys(2, 7, 32) for _ in range(sets)]
    for out, x, where in zip(model(maps, cells, keys, 8.0), maps, cells, strict=True):
        torch.testing.assert_close(out, slow_transformer(model, x, where, keys, 8.0), atol=2e-5, rtol=1e-4)


def test_tiles_give_the_same_outputs_and_gradients() -> None:
    whole, tiled = (widened(BVRTransformer(16, 4, 2, tile=tile)).double() for tile in (100, 7))
    tiled.load_state_dict(whole.state_dict())
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    cells = torch.rand(30, 2, dtype=torch.float64) * 60
    keys = [Keys(*(t.double() for t in random_keys(2, 5, 16))) for _ in range(2)]
    grads = []
    for model in (whole, tiled):
        own = x.clone().requires_grad_()
        out = model([own], [cells], keys, 8.0)[0]
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        grads.append([out, own.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_keys_are_peaks_one_entry_for_each_class() -> None:
    head = KeypointHead(2, 8, (8, 16), stacked_convs=0, logits_convs=0, norm=False)
    heat = torch.full((1, 2, 4, 4), -5.0)
    heat[0, 0, 1, 2], heat[0, 1, 1, 2], heat[0, 0, 1, 1] = 3.0, 2.0, 1.0  # the last is no peak
    heat[0, 0, 3, 0] = 0.5
    low = torch.full((1, 2, 2, 2), -9.0)
    low[0, 1, 0, 1] = 4.0
    offsets = [torch.zeros(1, 2, 4, 4), torch.full((1, 2, 2, 2), 0.25)]
    features = [torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 2)]
    keys = head.select([heat, low], offsets, features, per_level=3, total=4)
    assert keys.positions[0].tolist() == [[16 + 8 + 4, 12], [20, 12], [20, 12], [4, 28]]
    torch.testing.assert_close(keys.features[0, 1], features[0][0, :, 1, 2])
    torch.testing.assert_close(keys.features[0, 0], features[1][0, :, 0, 1])
    for better, worse in pairwise(keys.scores[0].tolist()):
        assert better >= worse


def test_targets_mark_the_nearest_cell_of_every_level() -> None:
    boxes = torch.tensor([[5.0, 9.0, 21.0, 29.0], [30.0, 2.0, 60.0, 40.0]])
    labels = torch.tensor([1, 0])
    cells = KeypointHead(2, 8, (8, 16)).cell_positions([torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 4)])
    heat, shift, mask = point_targets("top_left_corner", boxes, labels, cells, (8, 16), 2)
    assert mask.nonzero().flatten().tolist() == [3, 8, 64, 65]
    torch.testing.assert_close(shift[8], torch.tensor([(5 - 4) / 8, (9 - 12) / 8]))
    torch.testing.assert_close(shift[64 + 1], torch.tensor([(30 - 24) / 16, (2 - 8) / 16]))
    sigma = (2 * gaussian_radius(torch.tensor([20.0]), torch.tensor([16.0])) + 1) / 6
    assert heat[8, 1] == 1
    assert heat[9, 1] == pytest.approx(float(torch.exp(-(8.0**2) / (2 * sigma**2))), rel=1e-5)
    corner = point_targets("bottom_right_corner", boxes, labels, cells, (8, 16), 2)[2]
    assert corner[: 8 * 8].nonzero().flatten().tolist() == [3 * 8 + 2, 4 * 8 + 7]


def test_radius_solves_the_published_quadratics() -> None:
    h, w, o = torch.tensor([20.0, 64.0]), torch.tensor([16.0, 31.0]), 0.7
    r = gaussian_radius(h, w, o)
    residuals = torch.stack(
        [
            r**2 - r * (h + w) + h * w * (1 - o) / (1 + o),
            4 * r**2 - 2 * (h + w) * r + (1 - o) * h * w,
        ]
    )
    assert (residuals.abs().amin(0) < 1e-2 * h * w).all()


def test_losses_without_objects_are_finite_and_have_gradients() -> None:
    head = KeypointHead(3, 32, (8, 16))
    logits, offsets = head([torch.randn(2, 32, 4, 4), torch.randn(2, 32, 2, 2)])
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    losses = head.loss(logits, offsets, nothing)
    torch.stack(list(losses.values())).sum().backward()
    assert losses["loss_point_offset"] == 0
    assert losses["loss_point_cls"].isfinite()
    last: Any = head.get_submodule("keypoint_cls_heads.center")[-1]  # pyright: ignore[reportIndexIssue]
    assert last.weight.grad.abs().sum() > 0


def test_focal_loss_of_a_peak_and_of_its_surroundings() -> None:
    p, near = 0.8, 0.6
    logits = torch.tensor([math.log(p / (1 - p))] * 2)
    expected = -math.log(p) * 0.2**2 - math.log(0.2) * p**2 * (1 - near) ** 4
    assert gaussian_focal_loss(logits, torch.tensor([1.0, near])).item() == pytest.approx(expected, rel=1e-5)


def test_parameters_of_the_official_configuration() -> None:
    assert sum(p.numel() for p in KeypointHead(80).parameters()) == 7_651_062
    assert sum(p.numel() for p in BVRTransformer().parameters()) == 265_224
    assert sum(p.numel() for p in BVRTransformer(num_sets=2).parameters()) == 528_392


class Towers(nn.Module):
    """A host with one convolution per tower."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.reg = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)

    def forward_features(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.cls(x) for x in features], [self.reg(x) for x in features]

    def forward_predictions(self, cls_features: list[Tensor], reg_features: list[Tensor]) -> dict[str, Tensor]:
        return {"cls": cls_features[0], "reg": reg_features[0]}

    def compute_loss(self, *_: object) -> dict[str, Tensor]:
        return {"host": torch.zeros(())}


def test_head_joins_towers_keys_and_attention_and_ignores_the_official_buffer() -> None:
    head = BVRHead(Towers(), 3, 32, (8, 16), num_heads=4, total=10)
    widened(head.cls_transformer)
    widened(head.reg_transformer)
    maps = [torch.randn(2, 32, 4, 5), torch.randn(2, 32, 2, 3)]
    out = head(maps)
    cls_maps, reg_maps = head.bbox_head.forward_features(maps)
    logits, offsets = out["keypoint_logits"], out["keypoint_offsets"]
    cells = head.keypoint_head.cell_positions(maps)
    for name, source, kinds, transformer in (
        ("cls", cls_maps, ["center"], head.cls_transformer),
        ("reg", reg_maps, ["top_left_corner", "bottom_right_corner"], head.reg_transformer),
    ):
        keys = [head.keypoint_head.select(logits[k], offsets[k], source, total=10) for k in kinds]
        expected = slow_transformer(transformer, source[0], cells[0], keys, 8.0)
        torch.testing.assert_close(out[name], expected, atol=2e-5, rtol=1e-4)
    state = head.state_dict()
    state["cls_transformer.relative_positional_encoding.base_embedding"] = torch.zeros(1, 401, 401, 32)
    head.load_state_dict(state)  # strict
    assert "keypoint_logits" not in head.eval()(maps)
    assert set(logits) == set(POINT_TYPES)


@pytest.mark.parametrize(("geometry", "tables"), [("shared", 1), ("towers", 2), ("sets", 3)])
def test_each_set_of_keys_reads_the_geometry_table_that_it_has(geometry: Any, tables: int) -> None:
    head = BVRHead(Towers(), 3, 32, (8, 16), num_heads=4, total=10, geometry=geometry)
    own = [*head.cls_transformer.geometries(), *head.reg_transformer.geometries()]
    assert len({id(part) for part in own}) == tables
    for part in own:
        torch.nn.init.normal_(part.embedding_transform[0].conv.weight, std=0.3)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    query, cells = torch.randn(2, 6, 32), torch.rand(6, 2) * 64
    keys = [Keys(torch.randn(2, 5, 32), torch.rand(2, 5, 2) * 64, torch.rand(2, 5)) for _ in range(2)]
    alone = query.clone()
    for layer, key, part in zip(head.reg_transformer.decoder, keys, own[1:], strict=True):
        offsets = (key.positions[:, None] - cells[:, None]) / 8
        alone = alone + layer(query, key.features, part(offsets))
    torch.testing.assert_close(head.reg_transformer.attend(query, cells, keys, 8.0), alone.relu())
    with pytest.raises(ValueError, match="geometry must be 'shared', 'towers' or 'sets', got geometry='own'"):
        BVRHead(Towers(), 3, 32, (8, 16), num_heads=4, geometry="own")  # pyright: ignore[reportArgumentType]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="dim must be a multiple of 4, base_size even; got dim=30, base_size=400"):
        RelativeGeometry(8, 30)
    with pytest.raises(ValueError, match="num_heads=5 must divide dim=32"):
        KeyAttention(32, 5)
    with pytest.raises(ValueError, match="bbox_head Linear has no forward_features"):
        BVRHead(nn.Linear(1, 1), 3)
