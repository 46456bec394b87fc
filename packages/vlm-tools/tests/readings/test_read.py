"""READ: points, their order, labels and gradients."""

import pytest
import torch

from vlm_tools.readings.read import similarity, similarity_points


def test_similarity_points_are_sorted_labelled_and_differentiable() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(576, 8, requires_grad=True)
    scores = similarity(tokens, torch.ones(8))
    points, labels = similarity_points(scores, (200, 300), count=200)
    assert set(labels.tolist()) == {-1, 0, 1}
    order = [(1, 0, -1).index(int(label)) for label in labels]
    assert order == sorted(order)
    assert bool((points[:, 0] < 300).all())
    points.sum().backward()
    assert float(tokens.grad.abs().sum()) > 0  # type: ignore[union-attr]
    whole, _ = similarity_points(scores.detach(), (200, 300), count=200, continuous=False)
    assert (whole - points).abs().max().item() < 1
    with pytest.raises(ValueError, match="scores are constant"):
        similarity_points(torch.ones(16), (8, 8))
    with pytest.raises(ValueError, match="square grid"):
        similarity_points(torch.rand(15), (8, 8))
