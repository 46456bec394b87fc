"""visual_attention_redistribution against the attention map, changed head by head and query by query."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import attention, visual_attention_redistribution
from attn_core.composites import visual_attention_redistribution as module
from attn_core.composites.visual_attention_redistribution import sink_tokens
from attn_core.testing import relative_error

IMAGE = slice(3, 11)
TOKENS = 17


@pytest.fixture(autouse=True, params=[True, False], ids=["parts", "groups"])
def formulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU takes, uncompiled, and what everything else takes."""
    monkeypatch.setattr(module, "_plain_cpu", lambda _: request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 2, key_heads: int = 2, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q = 2 * random(batch, 4, TOKENS, 8)
    k, v = random(batch, key_heads, TOKENS, 8, seed=1), random(batch, key_heads, TOKENS, width, seed=2)
    visual, sink = torch.zeros(2, batch, TOKENS, dtype=torch.bool)
    visual[:, IMAGE] = True
    sink[0, [0, 5, 9]] = True
    if batch > 1:
        sink[1, [1, 4]] = True
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), visual, sink


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual: Tensor,
    sink: Tensor,
    rho: float = 0.5,
    summ: float = 0.2,
    p: float = 0.6,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    s = (q @ k.mT * D**-0.5).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    attn = s.softmax(-1)
    chosen, rows = torch.zeros(B, H, N, dtype=torch.bool), []
    for b in range(B):
        sinks = visual[b] & sink[b]
        for h in range(H):
            for i in range(N):
                a = attn[b, h, i]
                image = a[visual[b]]
                portion = a[sinks].sum() / (image + 1e-6).sum()
                if bool(sinks.any()) and portion <= rho and image.sum() >= summ and (allowed is None or allowed[b, i]):
                    chosen[b, h, i] = True
                    budget = (1 - p) * a[sink[b]].sum()
                    receivers = visual[b] & ~sink[b]
                    ratio = torch.where(receivers, a, 0.0) / a[receivers].sum()
                    a = torch.where(sink[b], p * a, a) + budget * ratio
                rows.append(a)
    changed = torch.stack(rows).view(B, H, N, N)
    return changed @ v, chosen


@pytest.mark.parametrize(
    "options", [{}, {"rho": 0.2}, {"summ": 0.6}, {"p": 0.0}, {"p": 1.0}], ids=lambda options: str(options)
)
def test_output_choice_and_gradients_equal_the_changed_map(options: dict[str, Any]) -> None:
    q, k, v, visual, sink = inputs()
    expected, expected_chosen = definition(q, k, v, visual, sink, **options)
    actual, chosen = visual_attention_redistribution(q, k, v, visual, sink, **options, causal="upper_left")
    assert torch.equal(chosen, expected_chosen)
    assert 0 < int(chosen.sum()) < chosen.numel()
    assert relative_error(actual, expected) <= 1e-10
    weight = random(*expected.shape, seed=5)
    for got, want in zip(
        torch.autograd.grad((actual * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert relative_error(got, want) <= 2e-10


def test_query_mask_limits_the_choice() -> None:
    q, k, v, visual, sink = inputs()
    allowed = torch.zeros(2, TOKENS, dtype=torch.bool)
    allowed[0, 12:], allowed[1, 15:] = True, True
    expected, expected_chosen = definition(q, k, v, visual, sink, allowed=allowed)
    actual, chosen = visual_attention_redistribution(q, k, v, visual, sink, query_mask=allowed, causal="upper_left")
    assert torch.equal(chosen, expected_chosen)
    assert relative_error(actual, expected) <= 1e-10


def test_an_image_without_a_visual_sink_keeps_its_attention() -> None:
    q, k, v, visual, sink = inputs()
    sink[0, IMAGE] = False
    out, chosen = visual_attention_redistribution(q, k, v, visual, sink, causal="upper_left")
    assert not chosen[0].any()
    assert chosen[1].any()
    assert relative_error(out[0], attention(q, k, v, causal="upper_left")[0][0]) <= 1e-12


def test_an_image_of_sinks_alone_keeps_its_attention() -> None:
    q, k, v, visual, _ = inputs()
    out, chosen = visual_attention_redistribution(q, k, v, visual, visual, rho=1.0)
    assert not chosen.any()
    assert relative_error(out, attention(q, k, v)[0]) <= 1e-12


def test_a_batch_equals_its_images_one_by_one() -> None:
    """The official code mixes up queries beyond one image."""
    q, k, v, visual, sink = inputs()
    out, _ = visual_attention_redistribution(q, k, v, visual, sink, causal="upper_left")
    for b in range(2):
        one = [x[b : b + 1] for x in (q, k, v, visual, sink)]
        assert relative_error(visual_attention_redistribution(*one, causal="upper_left")[0], out[b : b + 1]) <= 1e-12


def test_hidden_keys_do_not_count() -> None:
    q, k, v, visual, sink = inputs(batch=1)
    mask = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.3
    keep = mask[0]
    out, chosen = visual_attention_redistribution(q, k, v, visual, sink, key_mask=mask)
    less = [k[:, :, keep], v[:, :, keep], visual[:, keep], sink[:, keep]]
    expected, expected_chosen = visual_attention_redistribution(q, *less)
    assert torch.equal(chosen, expected_chosen)
    assert relative_error(out, expected) <= 1e-12


def test_bias_and_scale_reach_both_passes() -> None:
    q, k, v, visual, sink = inputs()
    bias = random(1, 4, TOKENS, TOKENS, seed=4)
    out, _ = visual_attention_redistribution(q, k, v, visual, sink, bias=bias, scale=1.0, p=1.0)
    assert relative_error(out, attention(q, k, v, bias=bias, scale=1.0)[0]) <= 1e-12


def test_sinks_are_tokens_with_a_large_normalized_sink_dimension() -> None:
    hidden = torch.ones(2, 5, 400)
    hidden[0, 3, 7], hidden[1, 0, 9], hidden[1, 2, 8] = -900.0, 900.0, 900.0
    expected = torch.zeros(2, 5, dtype=torch.bool)
    expected[0, 3] = expected[1, 0] = True
    assert not sink_tokens(hidden, (7, 9), tau=20.0).any()  # a single dimension reaches √400 at most
    assert torch.equal(sink_tokens(hidden, (7, 9), tau=19.0), expected)


def test_a_state_of_zeros_is_no_sink() -> None:
    assert not sink_tokens(torch.zeros(1, 3, 8), (2,), tau=0.5).any()
    assert not sink_tokens(torch.full((1, 3, 8), 1e-3), (2,), eps=1.0, tau=0.5).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 6, 8)}, r"visual_attention_redistribution: q must have 4 dimensions \(B H N D\)"),
        ({"k": torch.zeros(2, 9, 8)}, r"k must have 4 dimensions \(B Hk M D\)"),
        ({"visual": torch.zeros(1, 9)}, "visual must be one of bool, got visual.dtype=torch.float32"),
        ({"visual": torch.zeros(1, 8).bool()}, r"visual must broadcast to B M = \(2, 9\), got shape \(1, 8\)"),
        ({"sink": torch.zeros(1, 1).bool()}, r"sink must have size 9 along dimension 1 \(one flag for each token\)"),
        (
            {"sink": torch.zeros(1, 9, device="meta").bool()},
            r"sink must be on the device of q \(cpu\), got sink on meta",
        ),
        ({"query_mask": torch.zeros(1, 9).bool()}, r"query_mask must broadcast to B N = \(2, 6\), got shape \(1, 9\)"),
        ({"p": 1.5}, r"p must lie in \[0, 1\], got p=1.5"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    mask = torch.zeros(1, 9, dtype=torch.bool)
    given = {"q": torch.zeros(2, 4, 6, 8), "k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 5)}
    with pytest.raises(ValueError, match=message):
        visual_attention_redistribution(**{**given, "visual": mask, "sink": mask, **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dims", [(), (8,), (-1, 2)])
def test_sink_dimensions_that_do_not_exist_are_named(dims: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sink_tokens: dims must name dimensions 0…7, at least one, got dims="):
        sink_tokens(torch.zeros(1, 3, 8), dims)


def test_bad_arguments_of_sink_tokens_are_named() -> None:
    with pytest.raises(ValueError, match=r"sink_tokens: hidden must have 3 dimensions \(B N C\), got shape \(3, 8\)"):
        sink_tokens(torch.zeros(3, 8), (1,))
