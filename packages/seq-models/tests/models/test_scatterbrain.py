"""Scatterbrain for text: a network written out by the definition, unbiased weights, stability, the state's size."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models.models import create_model
from seq_models.models.scatterbrain import RandomDirections, ScatterbrainAttention, ScatterbrainConfig


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding by complex numbers; x (N, D)."""
    n, width = x.shape
    angle = torch.arange(n).double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def attended(q: Tensor, k: Tensor, v: Tensor, p: Tensor, window: int, support: str) -> Tensor:
    """The definition restricted to j ≤ i, pair by pair; q, k, v (N, D)."""
    scale, out = q.shape[1] ** -0.5, torch.zeros_like(v)

    def feature(x: Tensor) -> Tensor:
        y = x * scale**0.5
        return torch.cat([torch.exp(p @ y), torch.exp(-p @ y)]) * torch.exp(-(y @ y) / 2) / math.sqrt(2 * len(p))

    for i in range(len(q)):
        weights = []
        for j in range(i + 1):
            near = i - j < window and support != "low_rank"
            far = 0.0 * q[i, 0] if support == "sparse" else feature(q[i]) @ feature(k[j])
            weights.append(torch.exp(scale * q[i] @ k[j]) if near else far)
        weight = torch.stack(weights)
        out[i] = weight @ v[: i + 1] / weight.sum()
    return out


def plain(state: dict[str, Tensor], ids: Tensor, config: ScatterbrainConfig) -> Tensor:
    """Logits of one row: no layer of the package, no operator."""

    def normed(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    n, heads, width = len(ids), config.num_attention_heads, config.head_dim
    table = state["model.embed_tokens.weight"]
    x = table[ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        qkv = normed(x, f"{name}.attention_norm") @ state[f"{name}.attention.qkv.weight"].T
        q, k, v = qkv.view(n, 3, heads, width).unbind(1)
        p = state[f"{name}.attention.directions.projection"]
        outs = [
            attended(turned(q[:, h], config.rope_theta), turned(k[:, h], config.rope_theta), v[:, h], p, config.window,
                     config.support)
            for h in range(heads)
        ]  # fmt: skip
        x = x + torch.cat(outs, 1) @ state[f"{name}.attention.output.weight"].T
        inner = normed(x, f"{name}.feedforward_norm") @ state[f"{name}.w1.weight"].T
        x = x + (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2) @ state[f"{name}.w2.weight"].T
    return normed(x, "model.norm") @ table.T


@pytest.mark.parametrize("support", ["both", "sparse", "low_rank"])
@torch.no_grad()
def test_the_whole_network_equals_a_plain_one_written_out(support: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = create_model("test_scatterbrain", support=support).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(0, 256, (15,))
    expected = plain(model.state_dict(), ids, model.config)
    for at_once in (256, 4):
        monkeypatch.setattr("seq_models.models.scatterbrain.QUERIES_AT_ONCE", at_once)
        assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-10
    state = model(ids[None, :7], use_cache=True).past_key_values
    assert (model(ids[None, 7:], past_key_values=state).logits[0] - expected[7:]).abs().max() < 1e-10


def layer_of(**options: Any) -> ScatterbrainAttention:
    torch.manual_seed(0)
    layer = ScatterbrainAttention(ScatterbrainConfig(hidden_size=16, num_attention_heads=2, **options))
    layer.directions.reset_parameters()
    return layer


def test_gradients_equal_those_of_the_definition() -> None:
    layer = layer_of(window=3, num_features=6).double()
    q, k, v = (torch.randn(1, 2, 11, 8).double().requires_grad_() for _ in "qkv")
    p, probe = layer.directions.projection, torch.randn(1, 2, 11, 8).double()
    theirs = torch.stack([attended(q[0, h], k[0, h], v[0, h], p, 3, "both") for h in range(2)])[None]
    pairs = [torch.autograd.grad((out * probe).sum(), (q, k, v)) for out in (layer.attend(q, k, v)[0], theirs)]
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*pairs, strict=True))


@torch.no_grad()
def test_weights_are_unbiased_within_three_deviations_over_2000_draws() -> None:
    torch.manual_seed(0)
    directions = RandomDirections(10, 8).double()
    q, k = (0.5 * torch.randn(2, 1, 1, 5, 8).double()).unbind(0)  # beyond, the estimates' tails are heavy
    draws = []
    for _ in range(2000):
        directions.reset_parameters()
        (log_q, _), (log_k, _) = directions.log_features(q), directions.log_features(k)
        draws.append((log_q.exp() @ log_k.exp().mT)[0, 0])
    weights = torch.stack(draws)
    exact = torch.exp(q @ k.mT / 8**0.5)[0, 0]
    assert ((weights.mean(0) - exact).abs() < 3 * weights.std(0) / 2000**0.5).float().mean() >= 24 / 25


@torch.no_grad()
def test_directions_are_orthogonal_with_the_lengths_of_normal_vectors() -> None:
    torch.manual_seed(0)
    directions = RandomDirections(2 * 4000, 8)
    directions.reset_parameters()
    groups = directions.projection.view(-1, 8, 8)
    products = groups @ groups.mT
    off = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4
    assert directions.projection.square().sum(1).mean().item() == pytest.approx(8, abs=0.3)


@torch.no_grad()
def test_log_features_never_exceed_their_bounds() -> None:
    layer = layer_of(num_features=12)
    for size in (0.1, 1.0, 30.0):
        log, most = layer.directions.log_features(size * torch.randn(2, 2, 50, 8))
        assert bool((log <= most + 1e-4).all())


@pytest.mark.parametrize("norm", [1.0, 14.0])
@torch.no_grad()
def test_float32_follows_float64_up_to_squared_norms_of_200(norm: float) -> None:
    layer = layer_of(window=4, num_features=16)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in "qkv")
    q, k = (norm * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out, _ = layer.attend(q, k, v)
    exact, _ = layer.double().attend(q.double(), k.double(), v.double())
    assert bool(out.isfinite().all())
    assert (out - exact).abs().max() < 1e-3


@torch.no_grad()
def test_the_state_has_one_size_from_the_window_on() -> None:
    model: Any = create_model("test_scatterbrain").eval()
    ids = torch.randint(0, 256, (1, 60))
    sizes = {n: model(ids[:, :n], use_cache=True).past_key_values.nbytes() for n in (2, 3, 20, 60)}
    sums = 4 * 6 * 9
    assert sizes == {n: 2 * 4 * (2 * min(n, 3) * 32 + sums) for n in sizes}
    sparse: Any = create_model("test_scatterbrain", support="sparse").eval()
    assert sparse(ids, use_cache=True).past_key_values.nbytes() == 2 * 4 * 2 * 3 * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "ScatterbrainConfig: window must be at least 1, got window=0"),
        ({"num_features": 5}, "num_features must be even, at least 2, got num_features=5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScatterbrainConfig(**options)
