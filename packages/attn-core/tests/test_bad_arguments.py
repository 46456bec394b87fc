"""Every argument of every public function of attn_core, given what it is not: one line that names both."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attn_core
from attn_core import (
    attention,
    block_attention,
    explain,
    group_attention,
    halo_index,
    landmark_attention,
    scatterbrain,
    window_index,
)
from attn_core.testing import every_case

OPERATORS = {case.operator.__name__: case for case in reversed(every_case())}
WITH_WIDTH = ("attention", "block_attention", "deformable_attention", "group_attention", "linear_attention")


def heads(*shape: int) -> Tensor:
    return torch.randn(1, 2, *shape)


INDEX = torch.arange(6).view(1, 1, 2, 3)
OTHERS: dict[str, tuple[Any, ...]] = {
    "agent_attention": (heads(6, 4), heads(5, 4), heads(5, 4), heads(3, 4)),
    "causal_conv1d": (torch.randn(2, 3, 6), torch.randn(3, 4)),
    "causal_conv1d_update": (torch.randn(2, 3, 6), torch.randn(2, 3, 3), torch.randn(3, 4)),
    "depth_scores": (torch.rand(1, 6, 2, 3), [(2, 3)], torch.rand(1, 4, 2, 1, 2, 3)),
    "halo_index": (4, 4, (2, 2), (1, 1)),
    "inline_attention": (heads(6, 4), heads(6, 4), heads(6, 4)),
    "landmark_attention": (heads(6, 4), heads(6, 4), heads(6, 4), 3),
    "local_stride_table": (4, 2, 2, 2),
    "neural_memory_weights": (heads(6, 4), heads(6, 3), heads(6), heads(2), heads(4, 3)),
    "rank_augmented_attention": (heads(6, 4), heads(6, 4), heads(6, 4)),
    "routed_heads": (heads(6, 4), heads(5, 4), heads(5, 4), torch.rand(1, 6, 2)),
    "scatterbrain": (heads(6, 4), heads(6, 4), heads(6, 4), torch.randn(8, 4), INDEX, INDEX),
    "scored_deformable_attention": (
        *(torch.rand(1, 6, 2, 3), [(2, 3)], torch.rand(1, 4, 2, 1, 2, 2)),
        *(torch.rand(1, 4, 2, 1, 2), torch.rand(1, 4, 2, 1, 2, 4)),
    ),
    "topk_route": (torch.randn(1, 4, 8), torch.randn(1, 4, 8), 2),
    "visual_attention_redistribution": (
        *(heads(6, 4) for _ in range(3)),
        torch.arange(6)[None] < 3,
        torch.arange(6)[None] % 2 == 0,
    ),
    "window_index": (4, 4, (2, 2)),
}
FUNCTIONS = sorted({*OPERATORS, *OTHERS})
# What names a device, or is asked for by name, is refused by others with words of their own.
SKIPPED = {"device", "backend"}
ARGUMENTS = [
    (name, argument)
    for name in FUNCTIONS
    for argument in inspect.signature(getattr(attn_core, name)).parameters
    if argument not in SKIPPED
]


def call(name: str, **changes: Any) -> Any:
    function = getattr(attn_core, name)
    if name in OTHERS:
        args, kwargs = OTHERS[name], {}
    else:
        args, kwargs = OPERATORS[name].inputs(torch.float32)
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.arguments.update(changes)
    return function(*bound.args, **bound.kwargs)


def test_every_public_function_is_covered() -> None:
    assert {*FUNCTIONS, "explain", "use_backend"} == set(attn_core.__all__)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_another_kind_of_thing_is_refused_in_one_line(name: str, argument: str) -> None:
    for value in (np.zeros((2, 3)), "text", object(), {"a": 1}):
        with pytest.raises((TypeError, ValueError)) as refused:
            call(name, **{argument: value})
        message = str(refused.value)
        assert re.match(rf"{name}: {argument}\b", message), message
        assert "\n" not in message
        assert len(message) < 300


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_none_is_refused_unless_it_is_the_default(name: str, argument: str) -> None:
    if inspect.signature(getattr(attn_core, name)).parameters[argument].default is None:
        call(name, **{argument: None})
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: {argument}\b.*None") as refused:
        call(name, **{argument: None})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["attention", "group_attention"])
def test_a_mask_given_as_bias_is_sent_to_key_mask(name: str) -> None:
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=rf"{name}: bias must .* got bias.dtype=torch.bool; a mask of keys is key_mask"
    ):
        call(name, bias=mask)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="a mask of keys is key_mask"):
        call(name, bias=mask)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(("name", "argument"), [pair for pair in ARGUMENTS if pair[1] in ("scale", "eps", "rho")])
def test_a_factor_is_a_finite_number(name: str, argument: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{name}: {argument} must be a (finite )?number, got"):
        call(name, **{argument: value})


def test_a_scale_with_a_gradient_is_sent_to_the_tensors() -> None:
    with pytest.raises(TypeError, match=r"attention: scale must be a number, .*; a factor with a gradient is"):
        call("attention", scale=torch.tensor(0.5))


@pytest.mark.parametrize(
    "name",
    [*(name for name in OPERATORS if name in WITH_WIDTH), "landmark_attention", "inline_attention", "scatterbrain"],
)
def test_heads_of_no_width_are_refused(name: str) -> None:
    args = OTHERS[name] if name in OTHERS else OPERATORS[name].inputs(torch.float32)[0]
    with pytest.raises(
        ValueError, match=rf"{name}: (q|value) must have a width of at least 1 in its last dimension, got"
    ):
        getattr(attn_core, name)(*(x[..., :0] if isinstance(x, Tensor) and x.ndim == 4 else x for x in args))


ONES = torch.zeros(1, 1, 6, 4)


@pytest.mark.parametrize(
    ("call_", "message"),
    [
        (
            lambda: block_attention(ONES, ONES, ONES, INDEX + 1, INDEX),
            r"block_attention: q_index must hold −1 \(a hole\) or 0…5, the tokens of q, got q_index=6",
        ),
        (
            lambda: block_attention(ONES, ONES[:, :, :4], ONES[:, :, :4], INDEX, INDEX),
            r"kv_index must hold −1 \(a hole\) or 0…3, the tokens of k, got kv_index=5",
        ),
        (
            lambda: block_attention(ONES, ONES, ONES, INDEX, INDEX - 2),
            r"kv_index must hold −1 \(a hole\) or 0…5, the tokens of k, got kv_index=-2",
        ),
        (
            lambda: block_attention(ONES, ONES, ONES, INDEX, INDEX, torch.tensor([[[[0, 1], [2, 0]]]])),
            r"table must hold −1 \(a hole\) or 0…1, the blocks of kv_index, got table=2",
        ),
        (
            lambda: block_attention(ONES, ONES, ONES, INDEX % 3, INDEX),
            r"q_index must list each token once at most, got token 0 twice; use reduce='mean'",
        ),
        (
            lambda: scatterbrain(ONES, ONES, ONES, torch.zeros(8, 4), INDEX, INDEX + 4),
            r"scatterbrain: kv_index must hold −1 \(a hole\) or 0…5, the tokens of k, got kv_index=9",
        ),
        (lambda: scatterbrain(ONES, ONES, ONES, torch.zeros(8, 4), INDEX, INDEX, scale=-1.0), "scale must be positive"),
        (lambda: attention(ONES, ONES, ONES, axis_bias=ONES), r"axis_bias must be a list .*; put it into a tuple"),  # pyright: ignore[reportArgumentType]
        (lambda: group_attention(ONES, ONES, ONES, INDEX.view(1, 6), 2.0), "num_groups must be an integer, got"),  # pyright: ignore[reportArgumentType]
        (lambda: window_index(4, 4, (2, 2.0)), "window_index: window must be an integer, got window=2.0"),  # pyright: ignore[reportArgumentType]
        (lambda: halo_index(4, 4, 2, (1, 1)), r"halo_index: block must be a pair \(rows, columns\), got block=2"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_numbers_that_point_nowhere_are_named(call_: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call_()


def test_an_index_that_changed_is_looked_at_again() -> None:
    index = INDEX.clone()
    block_attention(ONES, ONES, ONES, index, index)
    index[..., 0] = 9
    with pytest.raises(ValueError, match="q_index must hold"):
        block_attention(ONES, ONES, ONES, index, index)


def test_a_query_twice_in_a_block_counts_twice_in_the_mean_alone() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    index = torch.tensor([[[[0, 0, 1], [3, 4, 5]]]])
    once, _ = block_attention(q, k, v, torch.tensor([[[[0, -1, 1], [3, 4, 5]]]]), INDEX)
    mean, lse = block_attention(q, k, v, index, INDEX, reduce="mean")
    torch.testing.assert_close(mean, once)
    assert lse[0, 0, 0] == -torch.inf


def test_explain_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="explain: unknown operator 'atention'; did you mean 'attention'"):
        explain("atention", ONES)
    with pytest.raises(
        ValueError, match="explain: unknown operator 'nosuch'; operators are additive_attention, attention"
    ):
        explain("nosuch")
    message = "explain: landmark_attention is composed of block_attention, group_attention, merge_attention, which have"
    with pytest.raises(ValueError, match=message):
        explain(landmark_attention, ONES, ONES, ONES, 2)
    with pytest.raises(TypeError, match="explain: the arguments of attention must hold a tensor, got none"):
        explain(attention, None, None, None)
