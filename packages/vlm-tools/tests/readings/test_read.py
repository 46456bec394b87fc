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


def test_thresholds_say_which_points_show_the_object_and_which_the_background() -> None:
    scores = torch.arange(16.0)

    def counts(**options: float) -> list[int]:
        _, labels = similarity_points(scores, (64, 64), down=1, continuous=False, **options)  # pyright: ignore[reportArgumentType]
        return [int((labels == label).sum()) for label in (1, 0, -1)]

    assert counts() == [4, 4, 8]
    assert counts(positive=0.5) == [8, 4, 4]
    assert counts(negative=0.5) == [4, 8, 4]


def test_a_shrunk_grid_gives_fewer_points() -> None:
    scores = torch.rand(144, generator=torch.Generator().manual_seed(0))
    sizes = [len(similarity_points(scores, (48, 48), down=down, count=1000)[1]) for down in (1, 2, 3)]
    assert sizes == [144, 36, 16]
