"""group_attention: the equation by loops, its properties, and every message."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import attention, group_attention
from attn_core.testing import TOLERANCE, Case, cases_of, relative_error


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    num_groups: int,
    group_weight: Tensor | None = None,
    group_gate: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One query at a time, one visible key at a time, numbers only."""
    B, H, N, D = q.shape
    M, shared = k.shape[2], H // k.shape[1]
    out, masses = q.new_zeros(B, H, N, v.shape[3]), q.new_full((B, H, N, num_groups), -math.inf)

    def at(x: Tensor, *index: int) -> float:
        return float(x[tuple(min(i, n - 1) for i, n in zip(index, x.shape, strict=True))])

    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(N)):
        exponentials: dict[int, dict[int, float]] = {}
        for j in range(M):
            g = int(group[min(b, group.shape[0] - 1), j])
            if g < 0 or (key_mask is not None and not key_mask[b, j]):
                continue
            if (causal == "upper_left" and j > i) or (causal == "lower_right" and j > i + M - N):
                continue
            s = float(q[b, h, i] @ k[b, h // shared, j]) * (D**-0.5 if scale is None else scale)
            s += 0.0 if bias is None else at(bias, b, h, i, j)
            exponentials.setdefault(g, {})[j] = math.exp(s)
        totals = {g: sum(members.values()) for g, members in exponentials.items()}
        if group_weight is not None:
            weights = {g: at(group_weight, b, h, i, g) for g in totals}
        else:
            sizes = totals if group_gate is None else {g: math.exp(at(group_gate, b, h, i, g)) for g in totals}
            weights = {g: size / sum(sizes.values()) for g, size in sizes.items()}
        for g, members in exponentials.items():
            masses[b, h, i, g] = math.log(totals[g])
            for j, e in members.items():
                out[b, h, i] += weights[g] * e / totals[g] * v[b, h // shared, j]
    return out, masses


@pytest.mark.parametrize("case", cases_of("group_attention"), ids=str)
def test_reference_equals_the_equation_by_loops(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    with torch.no_grad():
        expected = by_loops(*args, **kwargs)
        actual = group_attention(*args, **kwargs, backend="reference")
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[torch.float64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grouped(keys: int, groups: int, seed: int = 0, least: int = 0) -> Tensor:
    return torch.randint(least, groups, (1, keys), generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 20), m=st.integers(1, 30), groups=st.integers(1, 6), causal=st.booleans())
def test_without_weights_it_is_attention_and_the_masses_sum_to_its_lse(
    n: int, m: int, groups: int, causal: bool
) -> None:
    q, k, v = random(2, 4, n, 6), random(2, 2, m, 6, seed=1), random(2, 2, m, 5, seed=2)
    out, masses = group_attention(q, k, v, grouped(m, groups), groups, causal="lower_right" if causal else None)
    expected, lse = attention(q, k, v, causal="lower_right" if causal else None)
    assert relative_error(out, expected) <= 1e-10
    assert relative_error(masses.logsumexp(-1), lse) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(m=st.integers(1, 30), groups=st.integers(1, 6), seed=st.integers(0, 99))
def test_permuting_keys_with_their_groups_changes_nothing(m: int, groups: int, seed: int) -> None:
    q, k, v, group = random(1, 2, 5, 4), random(1, 2, m, 4, seed=1), random(1, 2, m, 4, seed=2), grouped(m, groups)
    gate = random(1, 2, 5, groups, seed=3)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    expected = group_attention(q, k, v, group, groups, group_gate=gate)
    actual = group_attention(q, k[:, :, order], v[:, :, order], group[:, order], groups, group_gate=gate)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(m=st.integers(1, 30), groups=st.integers(1, 6), seed=st.integers(0, 99))
def test_renaming_groups_permutes_the_masses_alone(m: int, groups: int, seed: int) -> None:
    q, k, v, group = random(1, 2, 5, 4), random(1, 2, m, 4, seed=1), random(1, 2, m, 4, seed=2), grouped(m, groups)
    weight = random(1, 2, 5, groups, seed=3)
    name = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    out, masses = group_attention(q, k, v, group, groups, group_weight=weight[..., name])
    renamed, renamed_masses = group_attention(q, k, v, name[group], groups, group_weight=weight)
    assert relative_error(renamed, out) <= 1e-10
    assert relative_error(renamed_masses[..., name], masses) <= 1e-10


def test_weights_equal_to_the_shares_and_gates_equal_to_the_masses_change_nothing() -> None:
    q, k, v, group = random(2, 2, 7, 4), random(2, 2, 9, 4, seed=1), random(2, 2, 9, 4, seed=2), grouped(9, 3)
    expected, masses = group_attention(q, k, v, group, 3)
    assert relative_error(group_attention(q, k, v, group, 3, group_weight=masses.softmax(-1))[0], expected) <= 1e-10
    assert relative_error(group_attention(q, k, v, group, 3, group_gate=masses)[0], expected) <= 1e-10


def test_weights_are_not_renormalized() -> None:
    q, k, v, group = random(1, 2, 7, 4), random(1, 2, 9, 4, seed=1), random(1, 2, 9, 4, seed=2), grouped(9, 3)
    weight = random(1, 2, 7, 3, seed=3)
    once = group_attention(q, k, v, group, 3, group_weight=weight)[0]
    twice = group_attention(q, k, v, group, 3, group_weight=2 * weight)[0]
    assert relative_error(twice, 2 * once) <= 1e-12


def test_a_group_far_below_the_others_keeps_its_own_average() -> None:
    """One maximum for all groups would lose it to underflow, and its gradient with it."""
    q = torch.ones(1, 1, 1, 1, requires_grad=True)
    k = torch.tensor([0.0, 0.0, 500.0]).view(1, 1, 3, 1)
    v = torch.tensor([2.0, 4.0, 100.0]).view(1, 1, 3, 1)
    weight = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    out, masses = group_attention(q, k, v, torch.tensor([[0, 0, 1]]), 2, group_weight=weight)
    assert out.item() == pytest.approx(3.0)
    assert masses.flatten().tolist() == pytest.approx([math.log(2), 500.0])


@pytest.mark.parametrize("below", [5.0, 300.0])
def test_the_mass_of_a_group_far_below_the_others_is_exact(below: float) -> None:
    q, k, v = (random(1, 2, n, 8, seed=n).float() for n in (5, 9, 9))
    group = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    bias = torch.where(group == 1, -below, 0.0)[:, None, None]
    _, masses = group_attention(q, k, v, group, 3, bias=bias, causal="lower_right")
    _, exact = group_attention(q.double(), k.double(), v.double(), group, 3, bias=bias.double(), causal="lower_right")
    assert relative_error(masses, exact) <= TOLERANCE[torch.float32]


def test_a_hidden_group_has_no_influence_on_others() -> None:
    q, k, v = random(1, 2, 5, 4), random(1, 2, 8, 4, seed=1), random(1, 2, 8, 4, seed=2)
    group = torch.tensor([[0, 1, -1, 0, 1, 7, 0, 1]])  # 7 is no group either
    expected = group_attention(q, k, v, group, 2)
    k[:, :, [2, 5]], v[:, :, [2, 5]] = 9.0, -9.0
    for a, b in zip(group_attention(q, k, v, group, 2), expected, strict=True):
        assert relative_error(a, b) <= 1e-12


def make(**replaced: object) -> dict[str, object]:
    group = torch.zeros(1, 9, dtype=torch.int64)
    base = {"q": torch.zeros(2, 4, 6, 8), "k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 5)}
    return {**base, "group": group, "num_groups": 3, **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 6, 8)}, r"group_attention: q must have 4 dimensions \(B H N D\), got shape \(4, 6, 8\)"),
        ({"q": torch.zeros(2, 4, 6, 8, dtype=torch.int32)}, "group_attention: q must be one of float64, float32"),
        ({"k": torch.zeros(2, 9, 8)}, r"k must have 4 dimensions \(B Hk M D\)"),
        ({"k": torch.zeros(2, 2, 9, 7)}, r"k must have size 8 along dimension 3 \(the width of q\)"),
        ({"k": torch.zeros(1, 2, 9, 8)}, r"k must have size 2 along dimension 0 \(the batch of q\)"),
        ({"v": torch.zeros(2, 2, 9)}, r"v must have 4 dimensions \(B Hk M Dv\)"),
        ({"v": torch.zeros(1, 2, 9, 5)}, r"v must have size 2 along dimension 0 \(the batch of q\)"),
        ({"v": torch.zeros(2, 2, 8, 5)}, r"v must have size 9 along dimension 2 \(the tokens of k\)"),
        ({"v": torch.zeros(2, 1, 9, 5)}, r"v must have size 2 along dimension 1 \(the heads of k\)"),
        ({"k": torch.zeros(2, 3, 9, 8), "v": torch.zeros(2, 3, 9, 5)}, "heads of q must be a multiple .* got 4 and 3"),
        ({"v": torch.zeros(2, 2, 9, 5).half()}, r"v must have the dtype of q \(torch.float32\)"),
        ({"v": torch.zeros(2, 2, 9, 5, device="meta")}, r"v must be on the device of q \(cpu\), got v on meta"),
        ({"group": torch.zeros(1, 9)}, "group must be one of int32, int64, got group.dtype=torch.float32"),
        ({"group": torch.zeros(3, 9).long()}, r"group must broadcast to B M = \(2, 9\), got shape \(3, 9\)"),
        ({"group": torch.zeros(2, 1).long()}, r"group must have size 9 along dimension 1 \(one group for each key\)"),
        ({"num_groups": 0}, "num_groups must be at least 1, got num_groups=0"),
        (
            {"group_weight": torch.zeros(1, 1, 1, 3), "group_gate": torch.zeros(1, 1, 1, 3)},
            "group_gate must be None when group_weight is given, got both",
        ),
        ({"group_weight": torch.zeros(1, 1, 1, 3).half()}, "group_weight must be one of float32, got group_weight.dty"),
        ({"group_gate": torch.zeros(1, 1, 5, 3)}, r"group_gate must broadcast to B H N G = \(2, 4, 6, 3\)"),
        ({"group_gate": torch.zeros(1, 1, 1, 1)}, r"group_gate must have size 3 along dimension 3 \(num_groups\)"),
        ({"bias": torch.zeros(2, 3, 6, 9)}, r"bias must broadcast to B H N M = \(2, 4, 6, 9\)"),
        ({"key_mask": torch.zeros(2, 9)}, "key_mask must be one of bool, got key_mask.dtype=torch.float32"),
        ({"key_mask": torch.zeros(3, 9).bool()}, r"key_mask must broadcast to B M = \(2, 9\)"),
        ({"key_mask": torch.zeros(2, 1).bool()}, r"key_mask must have size 9 along dimension 1 \(the tokens of k\)"),
        ({"causal": "lower"}, "causal must be one of None, 'upper_left', 'lower_right', got causal='lower'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_attention(**make(**changes))  # pyright: ignore[reportArgumentType]
