"""The study of approximations: estimates without bias, supports that are exact, and which kind errs least."""

from pathlib import Path

import torch

from seq_models.theory.approximation import approximations, clustered, draw, estimated, study


def test_the_estimate_is_unbiased_within_three_deviations_over_2000_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (0.5 * x for x in clustered(6, 8, 3, generator))  # heavy tails beyond
    draws = torch.stack([estimated(q, k, 12, generator) for _ in range(2000)])
    deviation = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - torch.exp(q @ k.T)).abs() < 3 * deviation).float().mean() > 0.97


def test_both_is_exact_on_its_support_and_sparse_is_zero_off_it() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = clustered(20, 8, 4, generator)
    found = approximations(q, k, 4, generator)
    weight = torch.exp(q @ k.T)
    largest = weight.topk(4, 1).indices
    ratio = found["both"].gather(1, largest) / weight.gather(1, largest)
    assert (ratio - ratio[:, :1]).abs().max() < 1e-12
    assert ((found["sparse"] > 0).sum(1) == 4).all()
    assert ((found["sparse twice"] > 0).sum(1) == 8).all()
    assert all((matrix.sum(1) - 1).abs().max() < 1e-12 for matrix in found.values())


def test_both_errs_less_than_its_parts_on_flat_rows_and_follows_sparse_on_peaked_ones(tmp_path: Path) -> None:
    rows = study((0.25, 1.0, 4.0), seeds=(0, 1, 2))
    flat, between, peaked = rows
    assert flat["entropy"] > between["entropy"] + 1 > peaked["entropy"] + 2
    assert flat["low-rank"] < flat["sparse"]
    for row in (flat, between):
        assert row["both"] < min(row["sparse"], row["low-rank"])
    assert peaked["both"] < min(2 * peaked["sparse"], 0.1 * peaked["low-rank"])
    assert all(row["sparse twice"] < row["sparse"] for row in rows)
    draw(rows, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000
