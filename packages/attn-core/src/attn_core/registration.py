# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false
# torch types Function.backward and vmap as (ctx, *args) and vjp's result as a union over has_aux.
"""Registration of a fused operator with torch, done once for every operator and backend.

A backend module has two plain functions, ``forward`` and ``backward``, which see tensors and Python scalars and know
nothing of autograd. :func:`register` turns the pair into a differentiable callable by the one pattern that was measured
to survive ``torch.compile(fullgraph=True)``, ``torch.export``, ``torch.func.grad``, ``vmap`` and double backward:

* both functions become library operators (``torch.ops.attn_core.<name>_forward`` and ``…_backward``) with fake
  implementations, so tracing never looks inside them;
* an ``autograd.Function`` with ``setup_context`` and a ``vmap`` rule joins them;
* the backward operator sits in a second ``Function`` whose own backward differentiates the reference: the second
  derivative costs the reference's memory, and is right.

``custom_op`` + ``register_autograd`` is shorter, but fails under ``torch.func`` and lets forward-mode return zeros.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# One kernel for every device: a composite key would let autograd record what happens inside.
DEVICE_KEYS = ("CPU", "CUDA", "MPS", "XPU")

_library = torch.library.Library("attn_core", "FRAGMENT")


def token_major(q: Tensor, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """Uninitialized (B, H, N, D) tensor whose memory is (B, N, H, D), so that joining the heads again is a view."""
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


@dataclass(frozen=True)
class Operator:
    """A registered pair of library operators and what ties them together."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., list[Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    list_at: int  # position of the list of tables: tensors before it, scalars behind it
    differentiable: tuple[int, ...]  # positions of single tensors with a gradient
    tables_differentiable: bool

    def arguments(self, scalars: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The library operators' arguments from flat tensors (tables last) and scalars."""
        return (*tensors[: self.list_at], list(tensors[self.list_at :]), *scalars)

    def slots(self, count: int) -> list[int]:
        """Positions, among ``count`` flat tensors, of those with a gradient."""
        return [*self.differentiable, *(range(self.list_at, count) if self.tables_differentiable else ())]

    def needed(self, count: int, needs: Sequence[bool]) -> list[int]:
        return [slot for slot, need in zip(self.slots(count), needs, strict=True) if need]


OPERATORS: dict[str, Operator] = {}


def register(
    name: str,
    *,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., list[Tensor]],
    fake_forward: Callable[..., tuple[Tensor, Tensor]],
    reference: Callable[..., tuple[Tensor, Tensor]],
    differentiable: Sequence[str],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make one differentiable callable from a forward and a backward function.

    Args:
        forward: ``forward(*tensors, axis_bias, *scalars) -> (out, lse)``. Tensors come first and may be None, then one
            list of tensors named ``axis_bias``, then Python scalars; the annotations give the schema. Every tensor has
            a leading batch dimension of size B or 1, where B is that of the first tensor.
        backward: ``backward(grad_out, grad_lse, out, lse, *forward's arguments, needs) -> gradients``. ``grad_lse`` is
            None when lse was not used. ``needs`` has one flag for each of ``differentiable`` (a flag for each table of
            the list; an absent tensor's flag is False); only needed gradients are returned, in that order.
        fake_forward: shapes, dtypes and strides of ``forward``'s outputs.
        reference: same arguments and outputs as ``forward``, differentiable by autograd; used for double backward.
        differentiable: names of the arguments with a gradient, ``"axis_bias"`` last if there is one.
    """
    parameters = list(inspect.signature(forward).parameters)
    list_at = parameters.index("axis_bias")

    def fake_backward(*args: Any) -> list[Tensor]:
        *_, needs = args
        forward_args = args[4:-1]
        flat = [*forward_args[:list_at], *forward_args[list_at]]
        return [empty_gradient(flat[slot], slot < 3) for slot in OPERATORS[name].needed(len(flat), needs)]

    schema = torch.library.infer_schema(forward, mutates_args=())
    inner = schema[1 : schema.index(")")]
    backward_schema = f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {inner}, bool[] needs) -> Tensor[]"
    OPERATORS[name] = Operator(
        forward=_define(f"{name}_forward", schema, forward, fake_forward),
        backward=_define(f"{name}_backward", backward_schema, backward, fake_backward),
        reference=reference,
        list_at=list_at,
        differentiable=tuple(parameters.index(argument) for argument in differentiable if argument != "axis_bias"),
        tables_differentiable="axis_bias" in differentiable,
    )

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        args = _distinct(args) if torch.compiler.is_compiling() else args
        return Forward.apply(name, tuple(args[list_at + 1 :]), *args[:list_at], *args[list_at])

    return call


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in DEVICE_KEYS:
        # The library operator itself has no gradient: autograd sees the Function around it alone.
        _library.impl(name, torch.no_grad()(function), key)
    torch.library.register_fake(f"attn_core::{name}", fake, lib=_library)
    return getattr(torch.ops.attn_core, name).default


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Repeated tensors as views of themselves: torch.compile refuses a Function that gets one tensor twice."""
    seen: list[Tensor] = []
    distinct = []
    for argument in args:
        if isinstance(argument, Tensor):
            if any(argument is tensor for tensor in seen):
                argument = argument.view_as(argument)
            seen.append(argument)
        distinct.append(argument)
    return tuple(distinct)


# Both Functions are module-level and find their operator by name: torch.compile cannot trace a Function that it
# reaches through a closure.


class Forward(torch.autograd.Function):
    @staticmethod
    def forward(name: str, scalars: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        operator = OPERATORS[name]
        return operator.forward(*operator.arguments(scalars, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.name, ctx.scalars, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        slots = OPERATORS[ctx.name].slots(len(tensors))
        needs = tuple(ctx.needs_input_grad[2 + slot] for slot in slots)
        if grad_out is None:
            if grad_lse is None:
                return (None,) * (2 + len(tensors))
            grad_out = torch.zeros_like(out)
        grads = list(Backward.apply(ctx.name, ctx.scalars, needs, grad_out, grad_lse, out, lse, *tensors))
        flat: list[Tensor | None] = [None] * len(tensors)
        for slot, need in zip(slots, needs, strict=True):
            if need:
                flat[slot] = grads.pop(0)
        return None, None, *flat

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], name: str, scalars: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        count, batch = info.batch_size, _batch_size(tensors[0], in_dims[2])
        flat = [_fold(t, dim, count, batch, expand=False) for t, dim in zip(tensors, in_dims[2:], strict=True)]
        out, lse = Forward.apply(name, scalars, *flat)
        return (out.unflatten(0, (count, batch)), lse.unflatten(0, (count, batch))), (0, 0)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        scalars: tuple[Any, ...],
        needs: tuple[bool, ...],
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        operator = OPERATORS[name]
        arguments = operator.arguments(scalars, tensors)
        return tuple(operator.backward(grad_out, grad_lse, out, lse, *arguments, list(needs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.scalars, ctx.needs, grad_out, grad_lse, _, _, *tensors = inputs
        ctx.save_for_backward(grad_out, grad_lse, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operator = OPERATORS[ctx.name]
        grad_out, grad_lse, *tensors = ctx.saved_tensors
        slots = operator.needed(len(tensors), ctx.needs)

        def outputs(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            flat = list(tensors)
            for slot, value in zip(slots, inputs, strict=True):
                flat[slot] = value
            return operator.reference(*operator.arguments(ctx.scalars, flat))

        def gradients(incoming: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (_, lse), pull = torch.func.vjp(outputs, *inputs)
            return pull((incoming[0], incoming[1] if len(incoming) == 2 else torch.zeros_like(lse)))

        incoming = (grad_out,) if grad_lse is None else (grad_out, grad_lse)
        _, pull = torch.func.vjp(gradients, incoming, tuple(tensors[slot] for slot in slots))
        d_incoming, d_inputs = pull(tuple(grads))
        flat: list[Tensor | None] = [None] * len(tensors)
        for slot, value in zip(slots, d_inputs, strict=True):
            flat[slot] = value
        d_lse = None if grad_lse is None else d_incoming[1]
        # out and lse are functions of the inputs: the recomputation accounts for them, so they get nothing.
        return None, None, None, d_incoming[0], d_lse, None, None, *flat

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], name: str, scalars: tuple[Any, ...], needs: tuple[bool, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[3:]
        count, batch = info.batch_size, _batch_size(args[4], dims[4])
        flat = [_fold(t, dim, count, batch, expand=True) for t, dim in zip(args, dims, strict=True)]
        grads = Backward.apply(name, scalars, needs, *flat)
        unfolded = []
        for slot, grad in zip(OPERATORS[name].needed(len(args) - 4, needs), grads, strict=True):
            grad = grad.unflatten(0, (count, batch))
            if _batch_size(args[4 + slot], dims[4 + slot]) == 1 and batch != 1:
                grad = grad.sum(1, keepdim=True)
            unfolded.append(grad)
        return tuple(unfolded), (0,) * len(unfolded)


def empty_gradient(tensor: Tensor, per_token: bool) -> Tensor:
    """Uninitialized gradient of an operand: token-major for q, k and v (``per_token``), contiguous for the rest."""
    if per_token:
        batch, heads, tokens, width = tensor.shape
        return token_major(tensor, batch, heads, tokens, width)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _batch_size(tensor: Tensor | None, dim: int | None) -> int:
    """Size of the leading dimension once the vmapped one is taken away."""
    assert tensor is not None
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _fold(tensor: Tensor | None, dim: int | None, count: int, batch: int, *, expand: bool) -> Tensor | None:
    """Fold a vmapped dimension of size ``count`` into the batch; an unbatched tensor of batch 1 stays as it is."""
    if tensor is None:
        return None
    if dim is None:
        if tensor.shape[0] == 1 and not expand:
            return tensor
        tensor = tensor.expand(count, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.expand(count, batch, *tensor.shape[2:]).flatten(0, 1)
