"""Two-stage sampling on depth-lifted maps: together it is the fused operator; what lies outside; errors."""

import pytest
import torch

from attn_core import deformable_attention
from attn_core.composites.depth_sampling import depth_scores, scored_deformable_attention
from attn_core.testing import relative_error, tensor

MAPS = [(4, 5), (2, 3)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_both_stages_equal_the_fused_operator_and_its_gradients(dtype: torch.dtype, bound: float) -> None:
    value, depth = tensor(dtype, "cpu", 2, 26, 3, 4), tensor(dtype, "cpu", 2, 26, 3, 5)
    locations = (torch.rand(2, 7, 3, 2, 2, 3, dtype=dtype) * 1.5 - 0.25).requires_grad_()
    weights = tensor(dtype, "cpu", 2, 7, 3, 2, 2)
    scores = depth_scores(depth, MAPS, locations)
    out = scored_deformable_attention(value, MAPS, locations[..., :2], weights, scores)
    inputs = [value, depth, locations, weights]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = deformable_attention(wide[0], MAPS, wide[2], wide[3], wide[1], backend="reference")
    assert relative_error(out, expected) <= bound
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, grad)
    for actual, right in zip(found, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert relative_error(actual, right) <= 2 * bound


def test_a_location_that_is_far_outside_or_not_a_number_reads_nothing() -> None:
    value, depth = torch.randn(1, 26, 1, 4), torch.rand(1, 26, 1, 5)
    locations = torch.tensor([[9.0, 0.5, 0.5], [0.5, torch.nan, 0.5], [-1e30, 0.5, 0.5]])
    locations = locations[None, :, None, None, None, :].expand(1, 3, 1, 2, 1, 3)
    scores = depth_scores(depth, MAPS, locations)
    assert torch.equal(scores, torch.zeros(1, 3, 1, 2, 1, 4))
    out = scored_deformable_attention(value, MAPS, locations[..., :2], torch.ones(1, 3, 1, 2, 1), scores + 1)
    assert torch.equal(out, torch.zeros(1, 3, 4))


def test_maps_of_another_number_of_cells_are_refused() -> None:
    locations = torch.rand(1, 2, 1, 2, 1, 3)
    with pytest.raises(ValueError, match=r"depth_scores: spatial_shapes must have the 25 cells of the maps, got"):
        depth_scores(torch.rand(1, 25, 1, 5), MAPS, locations)
    with pytest.raises(ValueError, match=r"scored_deformable_attention: spatial_shapes must have the 25 cells"):
        scored_deformable_attention(
            torch.rand(1, 25, 1, 5), MAPS, locations[..., :2], torch.ones(1, 2, 1, 2, 1), torch.ones(1, 2, 1, 2, 1, 4)
        )
