"""block_attention: the equation by loops, what it generalizes, its index builders, and every message."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import attention, block_attention, halo_index, topk_route, window_index
from attn_core.testing import TOLERANCE, Case, cases_of, relative_error


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None = None,
    *,
    kv_weight: Tensor | None = None,
    axis_bias: list[Tensor] | None = None,
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    self_logit: float | None = None,
    scale: float | None = None,
    reduce: str = "set",  # noqa: ARG001  both rules agree on what one block alone writes
) -> tuple[Tensor, Tensor]:
    """One query of one block at a time, one listed key at a time."""
    B, H, N, D = q.shape
    group = H // k.shape[1]
    results: dict[tuple[int, int, int], list[tuple[Tensor, float]]] = {}

    def at(x: Tensor, *index: int) -> Any:
        return x[tuple(min(i, n - 1) for i, n in zip(index, x.shape, strict=False))]

    for b in range(B):
        for h in range(H):
            for r in range(q_index.shape[2]):
                for t in at(q_index, b, h, r).tolist():
                    if t < 0:
                        continue
                    logits, values = [], []
                    row = [r] if table is None else at(table, b, h, r).tolist()
                    for slot, block in enumerate(row):
                        members = at(kv_index, b, h // group, block).tolist() if block >= 0 else []
                        for j, u in enumerate(members):
                            t_at = t if q_pos is None else int(at(q_pos, b, t))
                            u_at = u if k_pos is None else int(at(k_pos, b, u)) if u >= 0 else -1
                            if u < 0 or (causal and u_at > t_at):
                                continue
                            w = 1.0 if kv_weight is None else float(at(kv_weight, b, h, r, slot))
                            s = float(q[b, h, t] @ k[b, h // group, u]) * w * (D**-0.5 if scale is None else scale)
                            rest = j
                            for bias in reversed(axis_bias or []):
                                s += float(at(bias, b, h, t)[rest % bias.shape[3]])
                                rest //= bias.shape[3]
                            logits.append(self_logit if self_logit is not None and u_at == t_at else s)
                            values.append(w * v[b, h // group, u])
                    total = sum(math.exp(s) for s in logits)
                    out = sum(
                        (math.exp(s) / total * x for s, x in zip(logits, values, strict=True)), v.new_zeros(v.shape[3])
                    )
                    lse = math.log(total) if logits else -math.inf
                    results.setdefault((b, h, t), []).append((out, lse))
    out, lse = q.new_zeros(B, H, N, v.shape[3]), q.new_full((B, H, N), -math.inf)
    for index, found in results.items():
        out[index] = sum((x for x, _ in found), torch.zeros_like(found[0][0])) / len(found)
        lse[index] = found[0][1] if len(found) == 1 else -math.inf
    return out, lse


@pytest.mark.parametrize("case", cases_of("block_attention"), ids=str)
def test_reference_equals_the_equation_by_loops(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    with torch.no_grad():
        expected = by_loops(*args, **kwargs)
        actual = block_attention(*args, **kwargs, backend="reference")
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[torch.float64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(tokens: int, heads: int = 2, batch: int = 1) -> list[Tensor]:
    return [random(batch, heads, tokens, 4, seed=seed) for seed in range(3)]


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 7), width=st.integers(1, 7))
def test_one_window_over_the_whole_map_is_full_attention(height: int, width: int) -> None:
    q, k, v = qkv(height * width)
    index = window_index(height, width, (height, width))
    for a, b in zip(block_attention(q, k, v, index, index), attention(q, k, v), strict=True):
        assert relative_error(a, b) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 9), width=st.integers(1, 9), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_routing_to_every_region_is_full_attention(height: int, width: int, rows: int, columns: int) -> None:
    q, k, v = qkv(height * width)
    index = window_index(height, width, (rows, columns))
    blocks = index.shape[2]
    table = torch.arange(blocks).expand(1, 1, blocks, blocks)
    for a, b in zip(block_attention(q, k, v, index, index, table), attention(q, k, v), strict=True):
        assert relative_error(a, b) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), topk=st.integers(1, 9))
def test_the_order_of_the_table_does_not_matter(seed: int, topk: int) -> None:
    q, k, v = qkv(36)
    index = window_index(6, 6, (2, 2))
    table, _ = topk_route(random(1, 9, 5, seed=seed), random(1, 9, 5, seed=seed + 1), topk)
    for a, b in zip(
        block_attention(q, k, v, index, index, table),
        block_attention(q, k, v, index, index, table.flip(-1)),
        strict=True,
    ):
        assert relative_error(a, b) <= 1e-10


@pytest.mark.parametrize("first", [2**24, 2**40])
def test_positions_compare_exactly_however_large(first: int) -> None:
    q, k, v = (x.float() for x in qkv(12))
    index = window_index(3, 4, (3, 2))
    table = torch.arange(2).expand(1, 1, 2, 2)
    small = torch.arange(12)[None].flip(1)
    options: Any = {"causal": True, "self_logit": -3.0}
    expected = block_attention(q, k, v, index, index, table, q_pos=small, k_pos=small, **options)
    large = small + first
    actual = block_attention(q, k, v, index, index, table, q_pos=large, k_pos=large, **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_block_listed_twice_counts_twice() -> None:
    q, k, v = qkv(8)
    index = torch.arange(8).view(1, 1, 2, 4)
    table = torch.tensor([[0, 0, 1], [1, 0, 1]]).view(1, 1, 2, 3)
    bias = torch.zeros(8, 8, dtype=torch.float64)
    bias[:4, :4] = bias[4:, 4:] = math.log(2)
    for a, b in zip(
        block_attention(q, k, v, index, index, table), attention(q, k, v, bias=bias[None, None]), strict=True
    ):
        assert relative_error(a, b) <= 1e-10


@pytest.mark.parametrize("topk", [1, 3, 9])
def test_masked_and_gathered_forms_agree(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend takes one or the other by size; both must be the same function."""
    from attn_core.ops.block_attention import torch_backend

    index = window_index(6, 6, (2, 2))
    table, _ = topk_route(random(2, 9, 5), random(2, 9, 5, seed=1), topk)
    results = []
    for dense in (True, False):
        monkeypatch.setattr(torch_backend, "is_dense", lambda *_, dense=dense: dense)
        q, k, v = inputs = [x.requires_grad_() for x in qkv(36, batch=2)]
        out, lse = block_attention(q, k, v, index, index, table)
        results.append([out, lse, *torch.autograd.grad(out.sin().sum() + lse.sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 1e-10


def test_window_index_lists_windows_row_major_with_holes_outside() -> None:
    index = window_index(3, 4, (2, 3))
    assert index.dtype == torch.int32
    assert index[0, 0].tolist() == [
        [0, 1, 2, 4, 5, 6],
        [3, -1, -1, 7, -1, -1],
        [8, 9, 10, -1, -1, -1],
        [11, -1, -1, -1, -1, -1],
    ]


def test_halo_index_is_the_unfolded_map_with_holes_for_the_border() -> None:
    """Against torch's unfold of a map of token numbers + 1, whose zero padding marks the border."""
    numbers = torch.arange(1, 49, dtype=torch.float64).view(1, 1, 8, 6)
    unfolded = torch.nn.functional.unfold(numbers, (4, 6), padding=(1, 2), stride=(2, 2))
    unfolded = unfolded[0].T.reshape(4, 3, -1).flatten(0, 1) - 1
    assert torch.equal(halo_index(8, 6, (2, 2), (1, 2))[0, 0].double(), unfolded)


def test_topk_route_takes_the_best_regions_and_weighs_them_by_softmax() -> None:
    q, k = random(2, 5, 3), random(2, 7, 3, seed=1)
    table, weight = topk_route(q, k, 3, scale=0.5)
    affinity = 0.5 * q @ k.transpose(1, 2)
    ranked = affinity.argsort(-1, descending=True)[..., :3]
    assert torch.equal(table[:, 0], ranked)
    assert relative_error(weight[:, 0], affinity.gather(-1, ranked).softmax(-1)) <= 1e-12


def make(**replaced: object) -> dict[str, Any]:
    index = torch.arange(12).view(1, 1, 3, 4)
    base = {"q": torch.zeros(2, 4, 12, 8), "k": torch.zeros(2, 2, 12, 8), "v": torch.zeros(2, 2, 12, 5)}
    return {**base, "q_index": index, "kv_index": index, **replaced}


FOUR = torch.arange(16).view(1, 1, 4, 4) % 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k": torch.zeros(2, 3, 12, 8), "v": torch.zeros(2, 3, 12, 5)},
            "heads of q must be a multiple .* got 4 and 3",
        ),
        ({"q_index": torch.zeros(3, 4).long()}, r"block_attention: q_index must have 4 dimensions \(b h R I\)"),
        ({"q_index": torch.zeros(1, 1, 3, 4)}, "q_index must be one of int32, int64, got q_index.dtype=torch.float32"),
        ({"q_index": torch.zeros(1, 3, 3, 4).long()}, r"q_index must broadcast to b h R I = \(2, 4, 3, 4\)"),
        ({"kv_index": FOUR}, r"kv_index must have size 3 along dimension 2 \(one key block for each query block"),
        ({"table": torch.zeros(1, 1, 2, 1).long()}, r"table must broadcast to b h R K = \(2, 4, 3, 1\)"),
        ({"table": torch.zeros(1, 1, 1, 1).long()}, r"table must have size 3 along dimension 2"),
        ({"kv_weight": torch.zeros(1, 1, 3, 2)}, r"kv_weight must broadcast to b h R K"),
        ({"kv_weight": torch.zeros(1, 1, 1, 1)}, r"kv_weight must have size 3 along dimension 2"),
        ({"q_pos": torch.zeros(2, 11).long()}, r"q_pos must broadcast to B N = \(2, 12\)"),
        ({"k_pos": torch.zeros(2, 1).long()}, r"k_pos must have size 12 along dimension 1"),
        ({"axis_bias": [torch.zeros(1, 1, 12, 3)]}, "axis_bias must span the 4 slots of a key block, got axis_bias=3"),
        ({"axis_bias": [torch.zeros(1, 1, 11, 4)]}, r"axis_bias\[0\] must broadcast"),
        ({"reduce": "sum"}, "reduce must be one of 'set', 'mean', got reduce='sum'"),
        ({"v": torch.zeros(2, 2, 12, 5).double()}, "v must have the dtype of q"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_attention(**make(**changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_index(-1, 4, (2, 2)), "window_index: height must be at least 0, got height=-1"),
        (lambda: window_index(4, 4, (0, 2)), "window_index: window must be at least 1, got window=0"),
        (lambda: halo_index(4, 4, (2, 2), (-1, 0)), "halo must be at least 0, got halo=-1"),
        (
            lambda: topk_route(random(1, 4, 2), random(1, 4, 2), 5),
            "topk must lie in 1…4, the number of key regions, got topk=5",
        ),
    ],
)
def test_bad_index_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
