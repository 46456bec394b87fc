"""Attention over a set of keys from its results over parts of the set."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import DATA_DTYPES, check_dtype, check_rank, check_same, check_size, check_tensor_list, remembered
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "merge_attention"


def merge_attention(
    outs: Sequence[Float[Tensor, "B H N Dv"]] | Float[Tensor, "S B H N Dv"],
    lses: Sequence[Float[Tensor, "B H N"]] | Float[Tensor, "S B H N"],
    *,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """The result over all keys from S results ``(out, lse)`` over disjoint parts of the keys, exactly.

    lse = log Σ_s exp lse_s;  out = Σ_s exp(lse_s − lse) out_s. A query that sees no key of a part has lse_s = −inf
    there, whatever its out_s; one that sees no key at all gets out = 0, lse = −inf and zero gradients.

    Args:
        outs: results of the parts, one tensor each or stacked along a first dimension; nothing is copied.
        lses: their log-sum-exps (natural logarithm), float32 (float64 for float64 outs).

    Returns:
        out in the dtype of outs; lse in that of lses, differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there is no part. RuntimeError: the requested backend
            cannot run.

    Source: Dao 2023 (arXiv 2307.08691), §3.1: the rescaling of partial softmax results.
    """
    _check_parts(outs, lses)
    # Not unbind, which iteration calls: its views refuse in-place changes of the stack with a message of their own.
    parts = under_autocast(*(outs[s] for s in range(len(outs))))
    sums = [lses[s] for s in range(len(lses))]
    _check(parts, sums)
    run = _implementation(select(OPERATOR, backend, parts[0]))
    return run(Arguments([*parts, *sums], len(parts)))


def _check_parts(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, Tensor):
            check_tensor_list(OPERATOR, name, parts, "one for each part, or a stack of them")
        elif parts.ndim == 0:
            check_rank(OPERATOR, name, parts, "S B H N Dv" if name == "outs" else "S B H N")
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"{OPERATOR}: outs and lses must have one entry for each part, at least one, "
            f"got {len(outs)} and {len(lses)}"
        )


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.merge_attention
    return reference if backend == "reference" else torch_backend.merge_attention


@remembered
def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    first = outs[0]
    check_rank(OPERATOR, "outs[0]", first, "B H N Dv")
    check_dtype(OPERATOR, "outs[0]", first, DATA_DTYPES)
    for s, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_same(OPERATOR, first, {f"outs[{s}]": out}, first_name="outs[0]")
        check_same(OPERATOR, first, {f"lses[{s}]": lse}, dtype=False, first_name="outs[0]")
        check_rank(OPERATOR, f"outs[{s}]", out, "B H N Dv")
        check_rank(OPERATOR, f"lses[{s}]", lse, "B H N")
        check_dtype(OPERATOR, f"lses[{s}]", lse, (torch.float64 if first.dtype == torch.float64 else torch.float32,))
        for dim, size in enumerate(first.shape):
            check_size(OPERATOR, f"outs[{s}]", out, dim, size, "as in outs[0]")
        for dim, size in enumerate(first.shape[:3]):
            check_size(OPERATOR, f"lses[{s}]", lse, dim, size, "as in outs[0]")
