"""Random features: the definitions written out, ridge both ways, what the paper claims on a small scale."""

from pathlib import Path

import pytest
import torch

from seq_models.theory.random_features import (
    STRENGTHS,
    RandomFeatureAttention,
    RandomFeatureMLP,
    Target,
    errors,
    ridge,
)
from seq_models.theory.table import draw, measure


def test_features_are_those_of_the_definition() -> None:
    layer = RandomFeatureAttention(5, 3, bias=1.5)
    tokens, v = torch.randn(4, 7, 3).double(), torch.randn(5, 4).double()
    found = layer(tokens) @ v.flatten()
    for row, value in zip(tokens, found, strict=True):
        total, asked = 0.0, torch.cat([row[0], torch.ones(1).double()])
        for m in range(5):
            for key in row[1:]:
                x = torch.cat([key, torch.ones(1).double()])
                total += float((asked @ layer.weight[m] @ x).clamp(min=0) * (v[m] @ x)) / 6
        assert float(value) == pytest.approx(total, abs=1e-10)
    mlp = RandomFeatureMLP(6, 7, 3)
    flat = torch.cat([tokens.flatten(1), torch.ones(4, 1).double()], 1)
    assert torch.equal(mlp(tokens), (flat @ mlp.weight.T).clamp(min=0))


def test_random_matrices_have_the_paper_s_variance_and_the_bias_as_their_mean() -> None:
    weight = RandomFeatureAttention(20000, 2, bias=2.0, generator=torch.Generator().manual_seed(0)).weight
    expected = torch.zeros(3, 3).double()
    expected[0, 0] = expected[1, 1] = 2
    torch.testing.assert_close(weight.mean(0), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(weight.var(0), torch.full((3, 3), 0.25).double(), rtol=0, atol=0.02)


def test_the_order_of_the_keys_changes_no_feature() -> None:
    layer, tokens = RandomFeatureAttention(8, 3), torch.randn(2, 9, 3).double()
    mixed = torch.cat([tokens[:, :1], tokens[:, 1:][:, torch.randperm(8)]], 1)
    assert (layer(tokens) - layer(mixed)).abs().max() < 1e-12
    peer = RandomFeatureMLP(8, 9, 3)
    assert (peer(tokens) - peer(mixed)).abs().max() > 1e-3


@pytest.mark.parametrize("samples", [7, 40])
def test_ridge_is_where_the_gradient_vanishes_in_either_form(samples: int) -> None:
    features, target = torch.randn(samples, 20).double(), torch.randn(samples).double()
    weight = ridge(features, target, 0.3)
    assert (features.T @ (features @ weight - target) + 0.3 * weight).abs().max() < 1e-10
    with pytest.raises(ValueError, match=r"ridge: strength must be positive, got 0"):
        ridge(features, target, 0.0)


def test_the_fit_improves_with_heads() -> None:
    few, many = (errors(Target("beta", 2), 100, heads=heads, tested=200)["RFA"] for heads in (2, 200))
    assert many < 0.2 * few


def test_attention_beats_the_mlp_and_bias_helps_functions_of_the_query() -> None:
    """n = 256, three seeds, 300 of the spec's 1,000 heads."""
    own = [errors(Target("beta", 2), 256, seed=seed, heads=300, tested=300) for seed in range(3)]
    query = [errors(Target("query", 2), 256, seed=seed, heads=300, tested=300) for seed in range(3)]
    assert all(found["RFA"] < found["RF-MLP"] / 10 for found in own)
    assert all(found["BRFA"] < found["RFA"] < found["RF-MLP"] for found in query)


def test_one_key_leaves_a_two_layer_network_of_random_features() -> None:
    layer, tokens = RandomFeatureAttention(4, 2), torch.randn(3, 2, 2).double()
    one = torch.ones(3, 1).double()
    query, key = (torch.cat([tokens[:, i], one], 1) for i in (0, 1))
    inner = torch.stack([((query @ w) * key).sum(1).clamp(min=0) for w in layer.weight], 1)
    assert (layer(tokens) - (inner[..., None] * key[:, None]).flatten(1)).abs().max() < 1e-12


def test_the_table_is_measured_and_drawn(tmp_path: Path) -> None:
    table = measure(((Target("beta", 1), (16, 32)), (Target("query", 3), (16,))), seeds=(0, 1), heads=20)
    assert [(row["target"], row["samples"]) for row in table] == [
        ("mean ⟨β,x_i⟩", 16), ("mean ⟨β,x_i⟩", 32), ("mean ⟨x_0,x_i⟩^3", 16)
    ]  # fmt: skip
    alone = [errors(Target("beta", 1), 32, seed=seed, heads=20)["BRFA"] for seed in (0, 1)]
    assert table[1]["BRFA"] == pytest.approx(sum(alone) / 2)
    draw(table, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000
    assert len(STRENGTHS) == 6


def test_what_does_not_fit_is_named() -> None:
    for call, words in [
        (lambda: RandomFeatureAttention(0, 3), "heads must be at least 1, got heads=0"),
        (lambda: RandomFeatureAttention(1, 3)(torch.zeros(2, 1, 3)), r"tokens must be \(n, 1 \+ N, 3\) with N ≥ 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
