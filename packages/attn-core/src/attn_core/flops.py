"""Floating-point operations of the operators, for ``torch.utils.flop_counter`` and everything built on it.

Importing this module tells torch's counter what the operators' forward passes cost; without it the counter takes them
for nothing. Counted are the products of the definition, two operations for each multiply-add, as torch counts its own
attention: exponentials and biases cost nothing, and what causality or a mask hides is counted too.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from attn_core.dispatch import has_triton

Arguments = dict[str, Any]  # of an operator: shapes instead of tensors
FORMULAS: dict[str, Callable[[Arguments], int]] = {}


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of ``call()``, which runs without gradients; a model and inputs on the meta device will do.

    Multiply-adds, which papers often call FLOPs, are half of it.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _formula(operator: str) -> Callable[[Callable[[Arguments], int]], Callable[[Arguments], int]]:
    def keep(formula: Callable[[Arguments], int]) -> Callable[[Arguments], int]:
        FORMULAS[operator] = formula
        return formula

    return keep


@_formula("group_attention")
@_formula("attention")
def _attention(x: Arguments) -> int:
    return 2 * math.prod(x["q"][:3]) * x["k"][2] * (x["q"][3] + x["v"][3])


@_formula("block_attention")
def _block_attention(x: Arguments) -> int:
    queries = math.prod(x["q_index"][2:])
    listed = x["kv_index"][3] * (1 if x["table"] is None else x["table"][3])
    return 2 * x["q"][0] * x["q"][1] * queries * listed * (x["q"][3] + x["v"][3])


@_formula("neighborhood_attention")
def _neighborhood_attention(x: Arguments) -> int:
    return 2 * math.prod(x["q"][:-1]) * math.prod(x["kernel_size"]) * (x["q"][-1] + x["v"][-1])


@_formula("neighborhood_scores")
def _neighborhood_scores(x: Arguments) -> int:
    return 2 * math.prod(x["q"]) * math.prod(x["kernel_size"])


@_formula("neighborhood_values")
def _neighborhood_values(x: Arguments) -> int:
    return 2 * math.prod(x["p"]) * x["v"][-1]


@_formula("linear_attention")
def _linear_attention(x: Arguments) -> int:
    return 2 * (math.prod(x["q"]) + math.prod(x["k"])) * x["v"][3]


@_formula("channel_attention")
def _channel_attention(x: Arguments) -> int:
    return 4 * math.prod(x["a"]) * x["x"][3]


@_formula("additive_attention")
def _additive_attention(x: Arguments) -> int:
    batch, queries, width = x["q"]
    return 2 * batch * queries * x["k"][1] * (width + (x["value"][2] if x["value"] else 0))


@_formula("deformable_attention")
def _deformable_attention(x: Arguments) -> int:
    return 2 * 4 * math.prod(x["weights"]) * x["value"][3]


@_formula("focal_modulation")
def _focal_modulation(x: Arguments) -> int:
    return 2 * math.prod(x["ctx"]) * sum(math.prod(weight[2:]) + 1 for weight in x["weights"])


@_formula("linear_scan")
def _linear_scan(x: Arguments) -> int:
    return 2 * math.prod(x["b"])


@_formula("selective_scan")
def _selective_scan(x: Arguments) -> int:
    return 2 * 3 * math.prod(x["u"]) * x["A"][-1]  # decay and input, the state, the output


@_formula("merge_attention")
def _merge_attention(x: Arguments) -> int:
    return 2 * sum(math.prod(shape) for shape in x["tensors"][: x["parts"]])


def _register(backend: str, name: str, formula: Callable[[Arguments], int]) -> None:
    importlib.import_module(f"attn_core.ops.{name}.{backend}_backend")
    operator = getattr(torch.ops.attn_core, f"{name}_{backend}_forward")
    names = [argument.name for argument in operator.default._schema.arguments]

    @register_flop_formula(operator)
    def _(*args: Any, **_: Any) -> int:
        return formula(dict(zip(names, args, strict=True)))


for _name, _of in FORMULAS.items():
    for _backend in ("torch", "triton") if has_triton() else ("torch",):
        if importlib.util.find_spec(f"attn_core.ops.{_name}.{_backend}_backend") is not None:
            _register(_backend, _name, _of)


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)  # what `attn_core.linear` calls on a CPU
def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]
