"""deformable_attention: grid_sample, the trilinear identity, its properties, peers, and every message."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import deformable_attention
from attn_core.ops.deformable_attention import torch_backend
from attn_core.testing import cases_of, gradients, leaves, relative_error

Maps = tuple[tuple[int, int], ...]


def by_grid_sample(
    value: Tensor, maps: Maps, locations: Tensor, weights: Tensor, depth: Tensor | None = None
) -> Tensor:
    """Bilinear samples of each map; with depth, trilinear samples of the lifted map value ⊗ depth."""
    batch, _, heads, width = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    out = torch.zeros(batch, queries, heads, width, dtype=value.dtype)
    start = 0
    for level, (h, w) in enumerate(maps):
        cells = slice(start, start + h * w)
        start += h * w
        for head in range(heads):
            features = value[:, cells, head].transpose(1, 2).unflatten(2, (h, w))
            grid = 2 * locations[:, :, head, level] - 1
            if depth is None:
                samples = F.grid_sample(features, grid, align_corners=False)
            else:
                lifted = features.unsqueeze(2) * depth[:, cells, head].transpose(1, 2).unflatten(2, (h, w)).unsqueeze(1)
                samples = F.grid_sample(lifted, grid.unsqueeze(1), align_corners=False).squeeze(2)
            assert samples.shape == (batch, width, queries, points)
            out[:, :, head] = out[:, :, head] + torch.einsum("bcqp,bqp->bqc", samples, weights[:, :, head, level])
    assert levels == len(maps)
    return out.flatten(2)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "case", [case for case in cases_of("deformable_attention") if not case.name.startswith("no ")], ids=str
)
def test_output_and_gradients_equal_grid_sample(case: Any, backend: Any) -> None:
    args, _ = case.inputs(torch.float64)
    out, expected = deformable_attention(*args, backend=backend), by_grid_sample(*args)
    assert relative_error(out, expected) <= 1e-10
    for actual, peer in zip(gradients((out,), leaves(args, {})), gradients((expected,), leaves(args, {})), strict=True):
        assert relative_error(actual, peer) <= 1e-10


MAPS: Maps = ((6, 5), (3, 4))


def make(**replaced: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "value": torch.randn(2, 42, 3, 8, generator=generator),
        "spatial_shapes": MAPS,
        "locations": torch.rand(2, 7, 3, 2, 4, 2, generator=generator),
        "weights": torch.rand(2, 7, 3, 2, 4, generator=generator),
        **replaced,
    }


def test_a_tensor_of_spatial_shapes_is_as_good_as_a_tuple() -> None:
    arguments = make()
    expected = deformable_attention(**arguments)
    assert torch.equal(deformable_attention(**{**arguments, "spatial_shapes": torch.tensor(MAPS)}), expected)


@given(seed=st.integers(0, 1000), chunk=st.sampled_from([1, 100, 10_000]))
@settings(max_examples=15, deadline=None)
def test_split_queries_and_points_give_the_whole(seed: int, chunk: int) -> None:
    torch.manual_seed(seed)
    value, weights = torch.randn(2, 42, 3, 4, dtype=torch.float64), torch.randn(2, 9, 3, 2, 5, dtype=torch.float64)
    locations = torch.randn(2, 9, 3, 2, 5, 2, dtype=torch.float64)
    whole = deformable_attention(value, MAPS, locations, weights)
    previous, torch_backend.CHUNK_CORNERS = torch_backend.CHUNK_CORNERS, chunk
    try:
        pairs = zip(locations.split(4, 1), weights.split(4, 1), strict=True)
        rows = [deformable_attention(value, MAPS, x, w) for x, w in pairs]
    finally:
        torch_backend.CHUNK_CORNERS = previous
    assert relative_error(torch.cat(rows, 1), whole) <= 1e-12
    points = [slice(0, 2), slice(2, 5)]
    parts = [deformable_attention(value, MAPS, locations[..., p, :], weights[..., p]) for p in points]
    assert relative_error(parts[0] + parts[1], whole) <= 1e-12


def test_the_center_of_a_cell_reads_that_cell() -> None:
    value = torch.arange(12.0).view(1, 12, 1, 1)
    y, x = torch.meshgrid((torch.arange(3) + 0.5) / 3, (torch.arange(4) + 0.5) / 4, indexing="ij")
    locations = torch.stack([x, y], -1).view(1, 12, 1, 1, 1, 2)
    out = deformable_attention(value, [(3, 4)], locations, torch.ones(1, 12, 1, 1, 1))
    assert relative_error(out[0, :, 0], torch.arange(12.0)) <= 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("far", [1e30, -1e30, float("inf"), 2.0])
def test_samples_far_outside_give_zero_and_no_gradient(far: float, backend: Any) -> None:
    arguments = make(locations=torch.full((2, 7, 3, 2, 4, 2), far, requires_grad=True))
    out = deformable_attention(**arguments, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    (grad,) = torch.autograd.grad(out.sum(), arguments["locations"])
    assert torch.equal(grad, torch.zeros_like(grad))


def test_one_bin_in_its_middle_is_plain_deformable_attention() -> None:
    arguments = make()
    depth = torch.ones(2, 42, 3, 1)
    lifted = torch.cat([arguments["locations"], torch.full((2, 7, 3, 2, 4, 1), 0.5)], -1)
    out = deformable_attention(**{**arguments, "locations": lifted, "depth": depth})
    assert relative_error(out, deformable_attention(**arguments)) <= 1e-6


def test_locations_stay_exact_beside_bfloat16_values() -> None:
    """On 512 columns bfloat16 has steps of 2 columns; float32 locations read between two of them."""
    value = torch.arange(512.0).view(1, 512, 1, 1).bfloat16()
    locations = torch.tensor([301.0 / 512, 0.5]).view(1, 1, 1, 1, 1, 2)
    out = deformable_attention(value, [(1, 512)], locations, torch.ones(1, 1, 1, 1, 1).bfloat16())
    assert abs(float(out) - 300.5) <= 1.5


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own dependencies
def test_equals_transformers() -> None:
    peer = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    arguments = make()
    expected = peer.MultiScaleDeformableAttention()(
        arguments["value"], torch.tensor(MAPS), list(MAPS), None, arguments["locations"], arguments["weights"], 64
    )
    assert relative_error(deformable_attention(**arguments), expected) <= 2e-5


@pytest.mark.parity
def test_equals_mmcv() -> None:
    peer = pytest.importorskip("mmcv.ops.multi_scale_deform_attn")
    arguments = make()
    expected = peer.multi_scale_deformable_attn_pytorch(
        arguments["value"], torch.tensor(MAPS), arguments["locations"], arguments["weights"]
    )
    assert relative_error(deformable_attention(**arguments), expected) <= 2e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"value": torch.zeros(42, 3, 8)},
            r"deformable_attention: value must have 4 dimensions \(B S H D\), got shape",
        ),
        ({"value": torch.zeros(2, 42, 3, 8).int()}, "deformable_attention: value must be one of float64, float32"),
        ({"weights": torch.zeros(2, 7, 3, 2, 4).half()}, r"weights must have the dtype of value \(torch.float32\)"),
        ({"locations": torch.zeros(2, 7, 3, 2, 4, 2).half()}, "locations must be float32 when value is torch.float32"),
        ({"locations": torch.zeros(2, 7, 3, 2, 4)}, r"locations must have 6 dimensions \(B N H L P 2\)"),
        ({"locations": torch.zeros(1, 7, 3, 2, 4, 2)}, r"locations must have size 2 along dimension 0 \(the batch"),
        ({"locations": torch.zeros(2, 7, 1, 2, 4, 2)}, r"locations must have size 3 along dimension 2 \(the heads"),
        ({"locations": torch.zeros(2, 7, 3, 1, 4, 2)}, r"locations must have size 2 along dimension 3 \(the maps"),
        ({"locations": torch.zeros(2, 7, 3, 2, 4, 3)}, r"locations must have size 2 along dimension 5 \(x and y\)"),
        ({"depth": torch.zeros(2, 42, 3, 5)}, r"must have size 3 along dimension 5 \(x, y and the depth\)"),
        ({"weights": torch.zeros(2, 7, 3, 2, 3)}, r"weights must have the shape .* \(2, 7, 3, 2, 4\), got shape"),
        ({"weights": torch.zeros(2, 7, 3, 8)}, r"weights must have 5 dimensions \(B N H L P\)"),
        ({"spatial_shapes": ((6, 5), (3, 3))}, r"spatial_shapes must have 42 cells, those of value, got"),
        ({"spatial_shapes": ((6, 5), (-3, -4))}, "spatial_shapes must be at least 1, got spatial_shapes=-3"),
        ({"spatial_shapes": ()}, r"spatial_shapes must list .* got spatial_shapes=\[\]"),
        ({"locations": torch.zeros(2, 7, 3, 2, 4, 2, device="meta")}, "locations must be on the device of value"),
        ({"depth": torch.zeros(2, 42, 3)}, r"depth must have 4 dimensions \(B S H Z\)"),
        ({"depth": torch.zeros(2, 41, 3, 5)}, r"depth must have size 42 along dimension 1 \(the cells of value\)"),
        ({"depth": torch.zeros(2, 42, 3, 0)}, r"depth must have at least one bin, got shape \(2, 42, 3, 0\)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = make(**changes)
    if arguments.get("depth") is not None and "dimension 5" not in message:
        arguments["locations"] = torch.zeros(2, 7, 3, 2, 4, 3)
    with pytest.raises(ValueError, match=message):
        deformable_attention(**arguments)
