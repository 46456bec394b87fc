"""channel_attention: the equation by loops, official modules, its properties, and every message."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import channel_attention
from attn_core.testing import TOLERANCE, Case, cases_of, relative_error


def by_loops(
    a: Tensor, b: Tensor, x: Tensor, scale: float = 1.0, negate_max: bool = False, transpose: bool = False
) -> Tensor:
    """One row of logits at a time."""
    y = torch.zeros_like(x)
    for image in range(a.shape[0]):
        for head in range(a.shape[1]):
            A = torch.zeros(a.shape[3], a.shape[3], dtype=a.dtype)
            for c in range(a.shape[3]):
                logits = [scale * float(a[image, head, :, c] @ b[image, head, :, d]) for d in range(a.shape[3])]
                if negate_max:
                    logits = [max(logits) - logit for logit in logits]
                weights = [math.exp(logit - max(logits)) for logit in logits]
                A[c] = torch.tensor(weights, dtype=a.dtype) / sum(weights)
            y[image, head] = x[image, head] @ (A if transpose else A.t())
    return y


@pytest.mark.parametrize("case", cases_of("channel_attention"), ids=str)
def test_reference_equals_the_equation_by_loops(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    with torch.no_grad():
        actual = channel_attention(*args, **kwargs, backend="reference")
        assert relative_error(actual, by_loops(*args, **kwargs)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("version", ["ChannelAttention", "ChannelAttentionV2"])
def test_equals_timms_davit_module(version: str) -> None:
    davit = pytest.importorskip("timm.models.davit")
    module = getattr(davit, version)(24, num_heads=3).double()
    x = torch.randn(2, 50, 24, dtype=torch.float64)
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    # The second version scales by the number of tokens and exchanges the roles.
    operands, scale = ((k, v, q), 8**-0.5) if version == "ChannelAttention" else ((q, k, v), 50**-0.5)
    y = module.proj(channel_attention(*operands, scale=scale).transpose(1, 2).flatten(2))
    assert relative_error(y, module(x)) <= 1e-12


def test_equals_the_channel_module_of_danet() -> None:
    """Energy of a flattened map with itself; rows' maximum minus energy; softmax; times the map."""
    image = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    rows = image.flatten(2)
    energy = rows @ rows.mT
    weights = torch.softmax(energy.max(-1, keepdim=True).values - energy, dim=-1)
    x = rows.mT[:, None]
    y = channel_attention(x, x, x, negate_max=True)
    assert relative_error(y[:, 0].mT, weights @ rows) <= 1e-12
    assert y[:, 0].mT.unflatten(2, (5, 7)).is_contiguous(memory_format=torch.channels_last)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 30), c=st.integers(1, 20), seed=st.integers(0, 1000), transpose=st.booleans())
def test_permuting_the_tokens_permutes_the_result(n: int, c: int, seed: int, transpose: bool) -> None:
    a, b, x = (random(1, 2, n, c, seed=i) for i in range(3))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    expected = channel_attention(a, b, x, scale=0.3, transpose=transpose)[:, :, order]
    actual = channel_attention(*(t[:, :, order] for t in (a, b, x)), scale=0.3, transpose=transpose)
    assert relative_error(actual, expected) <= 1e-10


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 30), c=st.integers(1, 20), seed=st.integers(0, 1000), negate=st.booleans())
def test_permuting_the_channels_permutes_the_result(n: int, c: int, seed: int, negate: bool) -> None:
    x = random(1, 2, n, c, seed=1)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    expected = channel_attention(x, x, x, scale=0.3, negate_max=negate)[..., order]
    actual = channel_attention(*(t[..., order] for t in (x, x, x)), scale=0.3, negate_max=negate)
    assert relative_error(actual, expected) <= 1e-10


def test_a_batch_equals_its_images_one_by_one() -> None:
    a, b, x = (random(3, 2, 9, 8, seed=i) for i in range(3))
    pieces = torch.cat([channel_attention(*(t[i : i + 1] for t in (a, b, x))) for i in range(3)])
    assert relative_error(channel_attention(a, b, x), pieces) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_beyond_the_range_of_float16_are_summed_in_float32(dtype: torch.dtype) -> None:
    """56² tokens of unscaled features: a sum in float16 is infinite, one in bfloat16 is off by hundreds."""
    x = (torch.randn(1, 1, 112 * 112, 8) * 3).to(dtype)
    expected = channel_attention(x.double(), x.double(), x.double(), backend="reference")
    assert relative_error(channel_attention(x, x, x), expected) <= TOLERANCE[dtype]


def test_an_operand_shared_by_a_mapped_batch_gets_the_sum_of_its_gradients() -> None:
    a, b, x = random(4, 1, 2, 5, 6), random(1, 2, 5, 6, seed=1), random(1, 2, 5, 6, seed=2)

    def loss(b: Tensor) -> Tensor:
        return torch.func.vmap(lambda a: channel_attention(a, b, x).sin().sum())(a).sum()

    def looped(b: Tensor) -> Tensor:
        return sum((channel_attention(one, b, x).sin().sum() for one in a), torch.zeros(()))

    assert relative_error(torch.func.grad(loss)(b), torch.func.grad(looped)(b)) <= 1e-10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"a": torch.zeros(3, 6, 8)},
            r"channel_attention: a must have 4 dimensions \(B H N C\), got shape \(3, 6, 8\)",
        ),
        ({"b": torch.zeros(3, 6, 8)}, r"b must have 4 dimensions \(B H N C\)"),
        ({"x": torch.zeros(3, 6, 8)}, r"x must have 4 dimensions \(B H N C\)"),
        ({"a": torch.zeros(2, 3, 6, 8).long()}, "a must be one of float64, float32, bfloat16, float16"),
        ({"b": torch.zeros(1, 3, 6, 8)}, r"b must have size 2 along dimension 0 \(the batch of a\)"),
        ({"b": torch.zeros(2, 1, 6, 8)}, r"b must have size 3 along dimension 1 \(the heads of a\)"),
        ({"x": torch.zeros(2, 3, 5, 8)}, r"x must have size 6 along dimension 2 \(the tokens of a\)"),
        ({"x": torch.zeros(2, 3, 6, 7)}, r"x must have size 8 along dimension 3 \(the channels of a\)"),
        ({"b": torch.zeros(2, 3, 6, 8).half()}, r"b must have the dtype of a \(torch.float32\), got b.dtype"),
        ({"x": torch.zeros(2, 3, 6, 8, device="meta")}, r"x must be on the device of a \(cpu\), got x on meta"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {**{name: torch.zeros(2, 3, 6, 8) for name in "abx"}, **changes}
    with pytest.raises(ValueError, match=message):
        channel_attention(**arguments)  # pyright: ignore[reportArgumentType]
