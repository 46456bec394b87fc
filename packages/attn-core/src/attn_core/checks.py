"""Argument checks of the operators, with one message format: ``operator: argument must …, got argument=value``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

DATA_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
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


def check_rank(operator: str, argument: str, tensor: Tensor, layout: str) -> None:
    """``layout`` names the dimensions, for example ``"B H N D"``."""
    rank = len(layout.split())
    if tensor.ndim != rank:
        raise ValueError(f"{operator}: {argument} must have {rank} dimensions ({layout}), got shape {shape(tensor)}")


def check_size(operator: str, argument: str, tensor: Tensor, dim: int, expected: int, reason: str) -> None:
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
    for argument, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(
                f"{operator}: {argument} must be on the device of {first_name} ({first.device}), "
                f"got {argument} on {tensor.device}"
            )
        if dtype and tensor.dtype != first.dtype:
            raise ValueError(
                f"{operator}: {argument} must have the dtype of {first_name} ({first.dtype}), "
                f"got {argument}.dtype={tensor.dtype}; cast it, or run under torch.autocast"
            )


def check_dtype(operator: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{operator}: {argument} must be one of {names}, got {argument}.dtype={tensor.dtype}")


def check_choice(operator: str, argument: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{operator}: {argument} must be one of {names}, got {argument}={value!r}")


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
