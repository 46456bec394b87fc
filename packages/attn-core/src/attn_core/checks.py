"""Argument checks of the operators, with one message format: ``operator: argument must …, got argument=value``.

What something is (a tensor, a number, a flag) is a TypeError, what it holds a ValueError.
"""

import functools
import math
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import torch_internals

P = ParamSpec("P")
T = TypeVar("T")

DATA_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
# Numbers in index tensors are read on a CPU. On a GPU that would wait for it in each call: only if asked for.
CHECK_VALUES = os.environ.get("ATTN_CORE_CHECK_VALUES") == "1"
# Signatures that one function remembers; a process that meets more begins again.
MAX_REMEMBERED = 4096


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Call ``function`` once for each signature of its arguments, and give that result again.

    For checks and plans that depend on shapes, dtypes and devices of tensors and on values of Python scalars alone,
    never on what stands in a tensor or on its strides. Arguments come by position. An error is not remembered. Traced
    calls, tensor subclasses and arguments of other types are not remembered either.
    """
    results: dict[tuple[Any, ...], T] = {}

    @functools.wraps(function)
    def recall(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        key = signature(args)
        if key is None:
            return function(*args, **kwargs)
        try:
            return results[key]
        except KeyError:
            pass
        result = function(*args, **kwargs)
        if len(results) >= MAX_REMEMBERED:
            results.clear()
        results[key] = result
        return result

    recall.cache_clear = results.clear  # pyright: ignore[reportAttributeAccessIssue]
    return recall


def signature(arguments: Sequence[Any]) -> tuple[Any, ...] | None:
    """What :func:`remembered` compares; None if an argument cannot be compared."""
    key: list[Any] = []
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            key += (value.shape, value.dtype, value.device)
        elif kind in _SCALARS:
            key += (kind, value)  # with the type: True, 1 and 1.0 are equal keys
        elif kind is tuple or kind is list:
            inner = signature(value)
            if inner is None:
                return None
            key += (kind, inner)
        else:
            return None
    return tuple(key)


_SCALARS = frozenset((type(None), bool, int, float, str))


def fail(operator: str, argument: str, rule: str, value: object) -> NoReturn:
    """Raise ValueError naming the operator, the argument, the rule and the value that broke it."""
    raise ValueError(f"{operator}: {argument} {rule}, got {argument}={value}")


def described(value: object) -> str:
    """A value for a message of one line: itself if it is short, else what it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {shape(value)}"
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check_tensor(operator: str, argument: str, value: object) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        way = "; make it one with torch.as_tensor" if hasattr(value, "__array__") else ""
        raise TypeError(f"{operator}: {argument} must be a tensor, got {argument}={described(value)}{way}")


def check_tensor_list(operator: str, argument: str, value: object, meaning: str) -> None:
    """``value`` is a list or tuple of tensors; ``meaning`` says what each of them is."""
    if not isinstance(value, (list, tuple)):
        way = "; put it into a tuple" if isinstance(value, Tensor) else ""
        raise TypeError(
            f"{operator}: {argument} must be a list or tuple of tensors, {meaning}, "
            f"got {argument}={described(value)}{way}"
        )
    for position, item in enumerate(value):
        check_tensor(operator, f"{argument}[{position}]", item)


def check_number(operator: str, argument: str, value: object, *, optional: bool = False, finite: bool = True) -> None:
    """``value`` is a number and no tensor, finite unless said otherwise; None may stand for the default."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real, torch.SymInt, torch.SymFloat)):
        way = "; a factor with a gradient is multiplied into a tensor" if isinstance(value, Tensor) else ""
        raise TypeError(f"{operator}: {argument} must be a number, got {argument}={described(value)}{way}")
    if torch.compiler.is_compiling():  # a number may be a symbol there, which math does not take
        return
    if isinstance(value, float) and (math.isnan(value) or (finite and math.isinf(value))):
        fail(operator, argument, "must be a finite number" if finite else "must be a number", value)


def check_integer(operator: str, argument: str, value: object, least: int | None = None) -> None:
    """``value`` is an integer, at least ``least`` if that is given."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{operator}: {argument} must be an integer, got {argument}={described(value)}")
    number: Any = value
    if least is not None and number < least:
        fail(operator, argument, f"must be at least {least}", value)


def check_sizes(operator: str, argument: str, value: object, layout: str, least: int) -> None:
    """``value`` is a pair of integers; ``layout`` names them, for example ``"(rows, columns)"``."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{operator}: {argument} must be a pair {layout}, got {argument}={described(value)}")
    for size in value:
        check_integer(operator, argument, size, least)


def check_flag(operator: str, argument: str, value: object) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{operator}: {argument} must be True or False, got {argument}={described(value)}")


def check_width(operator: str, argument: str, tensor: Tensor) -> None:
    """The last dimension holds something: a product over nothing has no default scale."""
    if tensor.shape[-1] == 0:
        raise ValueError(
            f"{operator}: {argument} must have a width of at least 1 in its last dimension, got shape {shape(tensor)}"
        )


def check_values(operator: str, argument: str, index: Tensor, most: int, meaning: str) -> None:
    """Every number of an index lies in 0 … most, or is −1 for a hole; ``meaning`` says what is numbered.

    Looked at on a CPU; on a GPU with ``ATTN_CORE_CHECK_VALUES=1`` alone; never in a trace.
    """
    if not _readable(index):
        return
    low, high = (int(x) for x in index.aminmax())
    if low < -1 or high > most:
        allowed = f"−1 (a hole) or 0…{most}" if most >= 0 else "−1 (a hole) alone"
        fail(operator, argument, f"must hold {allowed}, {meaning}", low if low < -1 else high)


def check_boundaries(operator: str, argument: str, index: Tensor, most: int, meaning: str) -> None:
    """Numbers from 0 up to ``most``, none below the one before it; seen where :func:`check_values` sees.

    Raises:
        ValueError: also if there is no number at all.
    """
    if index.shape[0] == 0:
        raise ValueError(f"{operator}: {argument} must hold at least the 0 before the first sequence, got shape (0,)")
    if not _readable(index):
        return
    first, last, steps = int(index[0]), int(index[-1]), index.diff()
    if first != 0:
        fail(operator, argument, "must begin with 0", first)
    if steps.numel() and int(steps.min()) < 0:
        at = int(steps.argmin())
        raise ValueError(
            f"{operator}: {argument} must not decrease, got {int(index[at])} followed by {int(index[at + 1])}; "
            f"lengths are cumulated with torch.cumsum"
        )
    if last > most:
        raise ValueError(f"{operator}: {argument} must end with {most} at most, {meaning}, got {last}")


def check_no_repeats(operator: str, argument: str, index: Tensor, way: str) -> None:
    """No number but −1 stands twice in the last two dimensions of an index; seen where :func:`check_values` sees."""
    if not _readable(index):
        return
    ordered = index.flatten(-2).sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        token = int(ordered[..., 1:][twice][0])
        raise ValueError(f"{operator}: {argument} must list each token once at most, got token {token} twice; {way}")


def _readable(index: Tensor) -> bool:
    """Whether the numbers of an index can be read for nothing: they are no part of a trace, and wait for no GPU."""
    if torch.compiler.is_compiling() or type(index) is not Tensor or index.numel() == 0:
        return False
    if index.device.type != "cpu" and not (CHECK_VALUES and index.device.type != "meta"):
        return False
    return not torch_internals.is_transformed()


def default_scale(q: Tensor) -> float:
    """D^−0.5 of queries (…, D)."""
    return q.shape[-1] ** -0.5


def check_rank(operator: str, argument: str, tensor: Tensor, layout: str) -> None:
    """``layout`` names the dimensions, for example ``"B H N D"``."""
    check_tensor(operator, argument, tensor)
    rank = len(layout.split())
    if tensor.ndim != rank:
        raise ValueError(f"{operator}: {argument} must have {rank} dimensions ({layout}), got shape {shape(tensor)}")


def check_size(operator: str, argument: str, tensor: Tensor, dim: int, expected: int, reason: str) -> None:
    """Raises: ValueError unless dimension ``dim`` of the tensor has the expected size."""
    if tensor.shape[dim] != expected:
        raise ValueError(
            f"{operator}: {argument} must have size {expected} along dimension {dim} ({reason}), "
            f"got shape {shape(tensor)}"
        )


def check_broadcastable(operator: str, argument: str, tensor: Tensor, target: Sequence[int], layout: str) -> None:
    """Every size of ``tensor`` is 1 or that of ``target``; ranks are equal."""
    check_rank(operator, argument, tensor, layout)
    if any(size not in (1, full) for size, full in zip(tensor.shape, target, strict=True)):
        raise ValueError(
            f"{operator}: {argument} must broadcast to {layout} = {tuple(int(n) for n in target)}, "
            f"got shape {shape(tensor)}"
        )


def check_same(
    operator: str, first: Tensor, others: dict[str, Tensor | None], *, dtype: bool = True, first_name: str = "q"
) -> None:
    """All tensors live on the device of ``first`` and, if ``dtype``, share its dtype."""
    check_tensor(operator, first_name, first)
    for argument, tensor in others.items():
        if tensor is None:
            continue
        check_tensor(operator, argument, tensor)
        if tensor.device != first.device:
            raise ValueError(
                f"{operator}: {argument} must be on the device of {first_name} ({first.device}), "
                f"got {argument} on {tensor.device}"
            )
        if dtype and tensor.dtype == torch.bool:
            way = "; a mask of keys is key_mask" if argument == "bias" else ""
            raise ValueError(
                f"{operator}: {argument} must have the dtype of {first_name} ({first.dtype}), "
                f"got {argument}.dtype=torch.bool{way}"
            )
        if dtype and tensor.dtype != first.dtype:
            raise ValueError(
                f"{operator}: {argument} must have the dtype of {first_name} ({first.dtype}), "
                f"got {argument}.dtype={tensor.dtype}; cast it, or run under torch.autocast"
            )


def check_dtype(operator: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """``tensor`` has one of the dtypes."""
    check_tensor(operator, argument, tensor)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{operator}: {argument} must be one of {names}, got {argument}.dtype={tensor.dtype}")


def check_choice(operator: str, argument: str, value: object, choices: Sequence[object]) -> None:
    """Raises: ValueError unless ``value`` is one of the choices (equal, if a string; else the same object)."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{operator}: {argument} must be one of {names}, got {argument}={described(value)}")


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape as a plain tuple, for messages."""
    return tuple(tensor.shape)
