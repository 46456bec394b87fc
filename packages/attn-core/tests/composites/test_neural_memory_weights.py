# pyright: reportCallIssue=false, reportArgumentType=false
# Operands are unpacked from lists and dictionaries.
"""neural_memory_weights against autograd's gradients and the updates one chunk at a time."""

import pytest
import torch
from torch import Tensor

from attn_core import neural_memory_weights
from attn_core.testing import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def operands(chunks: int, size: int) -> dict[str, Tensor]:
    tokens = chunks * size
    return {
        "keys": random(2, 3, tokens, 4),
        "values": random(2, 3, tokens, 5, seed=1),
        "rate": random(2, 3, tokens, seed=2).detach().sigmoid().requires_grad_(),
        "forget": random(2, 3, chunks, seed=3).detach().sigmoid().requires_grad_(),
        "weight": random(2, 3, 4, 5, seed=4),
        "momentum": random(2, 3, chunks, seed=5).detach().sigmoid().requires_grad_(),
        "last_weight": random(2, 3, 4, 5, seed=6),
        "last_surprise": random(2, 3, 4, 5, seed=7),
    }


def definition(
    keys: Tensor,
    values: Tensor,
    rate: Tensor,
    forget: Tensor,
    weight: Tensor,
    momentum: Tensor | None = None,
    last_weight: Tensor | None = None,
    last_surprise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    chunks = forget.shape[-1]
    W = weight if last_weight is None else last_weight
    S = torch.zeros_like(weight) if last_surprise is None else last_surprise
    steps = [W]
    parts = zip(keys.chunk(chunks, 2), values.chunk(chunks, 2), rate.chunk(chunks, 2), strict=True)
    for c, (k, v, r) in enumerate(parts):

        def loss(at: Tensor, k: Tensor = k, v: Tensor = v, r: Tensor = r) -> Tensor:
            return ((k @ at - v).square().mean(-1) * r).sum()

        G = torch.func.grad(loss)(weight)
        S = -G if momentum is None else momentum[..., c, None, None] * S - G
        W = (1 - forget[..., c, None, None]) * W + S
        steps.append(W)
    return torch.stack(steps, 2), S


@pytest.mark.parametrize(("chunks", "size"), [(1, 3), (4, 1), (6, 5)])
@pytest.mark.parametrize("left_out", [(), ("momentum", "last_surprise"), ("last_weight", "last_surprise")])
def test_weights_and_gradients_equal_autograd_chunk_by_chunk(chunks: int, size: int, left_out: tuple[str, ...]) -> None:
    arguments = {name: x for name, x in operands(chunks, size).items() if name not in left_out}
    expected = definition(**arguments)
    actual = neural_memory_weights(**arguments)
    total = []
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) <= 1e-10
        weight = torch.randn_like(want)
        total.append(((got * weight).sum(), (want * weight).sum()))
    sums = [sum(terms[1:], terms[0]) for terms in zip(*total, strict=True)]
    pairs = zip(*(torch.autograd.grad(x, list(arguments.values())) for x in sums), strict=True)
    assert all(relative_error(got, want) <= 2e-10 for got, want in pairs)


def test_two_segments_equal_one_where_gradients_are_taken_at_the_same_weights() -> None:
    arguments = operands(6, 2)
    whole, surprise = neural_memory_weights(**arguments)
    first = {
        n: x[:, :, : x.shape[2] // 2] if "weight" not in n and n != "last_surprise" else x for n, x in arguments.items()
    }
    second = {
        n: x[:, :, x.shape[2] // 2 :] if "weight" not in n and n != "last_surprise" else x for n, x in arguments.items()
    }
    weights, carried = neural_memory_weights(**first)
    second |= {"last_weight": weights[:, :, -1], "last_surprise": carried}
    rest, last = neural_memory_weights(**second)
    assert relative_error(torch.cat([weights, rest[:, :, 1:]], 2), whole) <= 1e-12
    assert relative_error(last, surprise) <= 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(2, 12, 4).double()}, r"neural_memory_weights: keys must have 4 dimensions \(B H N D\)"),
        (
            {"values": torch.zeros(2, 3, 11, 5).double()},
            r"values must have size 12 along dimension 2 \(N of B H N Dv\)",
        ),
        ({"values": torch.zeros(2, 3, 12, 5)}, r"values must have the dtype of keys \(torch.float64\)"),
        ({"rate": torch.zeros(2, 3, 12)}, "rate must be one of float64, got rate.dtype=torch.float32"),
        ({"momentum": torch.zeros(2, 3, 4).double()}, r"momentum must have size 6 along dimension 2 \(T of B H T\)"),
        ({"weight": torch.zeros(2, 3, 5, 4).double()}, r"weight must have size 4 along dimension 2 \(D of B H D Dv\)"),
        (
            {"forget": torch.zeros(2, 3, 5).double(), "momentum": None},
            "must be a multiple of the chunks of forget, got 12 and 5",
        ),
        ({"last_weight": torch.zeros(2, 3, 4, 5, device="meta").double()}, "last_weight must be on the device of keys"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neural_memory_weights(**{**operands(6, 2), **changes})
