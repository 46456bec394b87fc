"""Which backend runs an operator, and why.

First match wins: the ``backend`` argument → :func:`use_backend` → the environment variable ``ATTN_CORE_BACKEND`` (read
once, when this module is imported) → ``triton`` if the tensors are on a GPU and the kernel supports them → ``torch``.
``reference`` is never chosen automatically. The choice depends on device, dtype and static shapes alone, so it is made
while tracing and leaves nothing in a compiled graph.
"""

import difflib
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attn_core.checks import described

from . import torch_internals

logger = logging.getLogger(__name__)

Backend = Literal["reference", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_environment = os.environ.get("ATTN_CORE_BACKEND") or None
_override: str | None = None
_logged: set[tuple[str, str]] = set()


def _checked(backend: str, where: str) -> Backend:
    for known in BACKENDS:
        if backend == known:
            return known
    raise ValueError(f"{where}: backend must be one of {', '.join(map(repr, BACKENDS))}, got backend={backend!r}")


if _environment is not None:
    _checked(_environment, "ATTN_CORE_BACKEND")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every operator inside the block on one backend, unless a call names its own.

    The setting belongs to the process, not to the thread: torch.compile guards on it.

    Raises:
        ValueError: ``backend`` is not ``"reference"``, ``"torch"`` or ``"triton"``.
    """
    global _override
    previous, _override = _override, _checked(backend, "use_backend")
    try:
        yield
    finally:
        _override = previous


# Looked up once: the search through the path takes longer than a small call of an operator.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether the ``triton`` package can be imported (it has no wheels for macOS and Windows)."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (``TRITON_INTERPRET=1`` at start-up)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(q: Tensor) -> str | None:
    """Why no Triton kernel can run on tensors like ``q``; None if one can."""
    if not has_triton():
        return "triton is not installed"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"Triton kernels take float32, bfloat16 and float16, not {q.dtype}"
    if interpreting():
        return None
    if q.device.type != "cuda":
        return f"Triton kernels need a GPU, the tensors are on {q.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"Triton kernels need compute capability 8.0, {q.device} has less"
    return None


def _none() -> None:
    """The obstacle of an operator whose kernel takes everything."""


def select(operator: str, backend: str | None, q: Tensor, obstacle: Callable[[], str | None] = _none) -> Backend:
    """The backend of ``operator`` for tensors like ``q``.

    Args:
        obstacle: why the operator's own kernel cannot take these arguments (None if it can); asked only after
            :func:`triton_obstacle` found nothing.

    Raises:
        ValueError: an unknown backend. RuntimeError: a requested backend cannot run; the message says why.
    """
    requested = backend if backend is not None else _override if _override is not None else _environment
    if requested is not None:
        chosen = _checked(requested, operator)
        if chosen == "triton":
            reason = triton_obstacle(q) or obstacle()
            if reason:
                raise RuntimeError(f"{operator}: backend='triton' cannot run: {reason}")
        return chosen
    if q.is_cuda:
        reason = triton_obstacle(q) or obstacle()
        if reason is None:
            return "triton"
        if not torch.compiler.is_compiling() and (operator, reason) not in _logged:
            _logged.add((operator, reason))
            logger.debug("%s: triton skipped: %s", operator, reason)
    return "torch"


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Data tensors in autocast's dtype where autocast is on; float64 stays, as in torch's own operators.

    What is no floating tensor stays as well: the checks that follow refuse it by name.
    """
    if not torch.compiler.is_compiling() and not torch_internals.is_autocast_on():
        return tensors
    first = next((tensor for tensor in tensors if isinstance(tensor, Tensor)), None)
    if first is None:
        return tensors
    kind = first.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _operator_package(name: str) -> Any:
    folder = importlib.import_module("attn_core.ops").__path__
    operators = sorted(module.name for module in pkgutil.iter_modules(folder))
    if name in operators:
        return importlib.import_module(f"attn_core.ops.{name}")
    composites = importlib.import_module("attn_core.composites").__path__
    if name in {module.name for module in pkgutil.iter_modules(composites)}:
        module = vars(importlib.import_module(f"attn_core.composites.{name}"))
        parts = ", ".join(part for part in operators if part in module)
        raise ValueError(f"explain: {name} is composed of {parts}, which have backends of their own; explain those")
    near = difflib.get_close_matches(name, operators, n=1)
    way = f"; did you mean {near[0]!r}?" if near else f"; operators are {', '.join(operators)}"
    raise ValueError(f"explain: unknown operator {name!r}{way}")


def explain(operator: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """What would run for these arguments: backend name → "chosen …" or the reason why not.

    Args:
        operator: a public operator of :mod:`attn_core`, or its name.

    Raises:
        ValueError: no operator has that name, a composite among them. TypeError: the arguments are not the operator's.

    Example:
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> explain("attention", q, q, q)["torch"]
        'chosen automatically'
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", described(operator))
    package = _operator_package(name)
    bound = inspect.signature(getattr(package, name)).bind(*args, **kwargs)
    bound.apply_defaults()
    leaves = torch.utils._pytree.tree_leaves(list(bound.arguments.values()))  # pyright: ignore[reportAttributeAccessIssue]
    q = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if q is None:
        raise TypeError(f"explain: the arguments of {name} must hold a tensor, got none")
    given = bound.arguments.get("backend")
    requested, source = next(
        (
            (value, source)
            for value, source in (
                (given, "by the backend argument"),
                (_override, "by use_backend"),
                (_environment, "by ATTN_CORE_BACKEND"),
            )
            if value is not None
        ),
        (None, "automatically"),
    )
    obstacle: Callable[..., str | None] = getattr(package, "triton_obstacle", lambda **_: None)
    triton_reason = triton_obstacle(q) or obstacle(**bound.arguments)
    chosen = requested or ("triton" if q.device.type == "cuda" and triton_reason is None else "torch")
    report = {
        "reference": "never chosen automatically",
        "torch": "runs everywhere, used where triton cannot run",
        "triton": triton_reason or ("possible" if q.device.type == "cuda" else "possible, never automatic on a CPU"),
    }
    if chosen == "triton" and triton_reason is not None:
        report["triton"] = f"chosen {source}, cannot run: {triton_reason}"
    else:
        report[chosen] = f"chosen {source}"
    return report
