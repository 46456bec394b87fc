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
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("attn_core", "FRAGMENT")


def token_major(q: Tensor, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """Uninitialized (B, H, N, D) tensor whose memory is (B, N, H, D), so that joining the heads again is a view."""
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attn_core::{name}", fake, lib=_library)
    return getattr(torch.ops.attn_core, name).default


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
        forward: ``forward(*tensors, tables, *scalars) -> (out, lse)``. Tensors come first and may be None, then one
            list of tensors named ``axis_bias``, then Python scalars; the annotations give the schema. Every tensor has
            a leading batch dimension of size B or 1, where B is that of the first tensor.
        backward: ``backward(grad_out, grad_lse, out, lse, *forward's arguments, needs) -> gradients``. ``grad_lse`` is
            None when lse was not used. ``needs`` has one flag for each of ``differentiable`` (a flag for each table of
            the list); only needed gradients are returned, in that order.
        fake_forward: shapes, dtypes and strides of ``forward``'s outputs.
        reference: same arguments and outputs as ``forward``, differentiable by autograd; used for double backward.
        differentiable: names of the arguments with a gradient, ``"axis_bias"`` last if there is one.
    """
    parameters = list(inspect.signature(forward).parameters)
    list_at = parameters.index("axis_bias")
    differentiable_at = [parameters.index(argument) for argument in differentiable if argument != "axis_bias"]

    def arguments(scalars: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return (*tensors[:list_at], list(tensors[list_at:]), *scalars)

    def gradient_slots(count: int) -> list[int]:
        """Positions, among ``count`` flat tensors, of those with a gradient."""
        tables = range(list_at, count) if "axis_bias" in differentiable else ()
        return [*differentiable_at, *tables]

    def fake_backward(*args: Any) -> list[Tensor]:
        needs = args[-1]
        forward_args = args[4:-1]
        flat = [*forward_args[:list_at], *forward_args[list_at]]
        wanted = [flat[slot] for slot, need in zip(gradient_slots(len(flat)), needs, strict=True) if need]
        return [empty_gradient(tensor, any(tensor is data for data in flat[:3])) for tensor in wanted]

    schema = torch.library.infer_schema(forward, mutates_args=())
    inner = schema[1 : schema.index(")")]
    backward_schema = f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {inner}, bool[] needs) -> Tensor[]"
    forward_op = _define(f"{name}_forward", schema, forward, fake_forward)
    backward_op = _define(f"{name}_backward", backward_schema, backward, fake_backward)

    def differentiable_backward(
        scalars: tuple[Any, ...],
        slots: list[int],
        grad_out: Tensor,
        grad_lse: Tensor | None,
        tensors: Sequence[Tensor | None],
    ) -> Callable[..., tuple[Tensor, ...]]:
        def gradients(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            def outputs(*inputs: Tensor) -> tuple[Tensor, Tensor]:
                flat = list(tensors)
                for slot, value in zip(slots, inputs, strict=True):
                    flat[slot] = value
                return reference(*arguments(scalars, flat))

            (_, lse), pull = torch.func.vjp(outputs, *inputs)
            return pull((grads[0], grads[1] if grad_lse is not None else torch.zeros_like(lse)))

        return gradients

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(
            scalars: tuple[Any, ...],
            needs: tuple[bool, ...],
            grad_out: Tensor,
            grad_lse: Tensor | None,
            out: Tensor,
            lse: Tensor,
            *tensors: Tensor | None,
        ) -> tuple[Tensor, ...]:
            return tuple(backward_op(grad_out, grad_lse, out, lse, *arguments(scalars, tensors), list(needs)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.scalars, ctx.needs, grad_out, grad_lse, _, _, *tensors = inputs
            ctx.save_for_backward(grad_out, grad_lse, *tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            grad_out, grad_lse, *tensors = ctx.saved_tensors
            slots = [
                slot for slot, need in zip(gradient_slots(len(tensors)), ctx.needs, strict=True) if need
            ]
            gradients = differentiable_backward(ctx.scalars, slots, grad_out, grad_lse, tensors)
            inputs = tuple(tensors[slot] for slot in slots)
            incoming = (grad_out,) if grad_lse is None else (grad_out, grad_lse)
            _, pull = torch.func.vjp(gradients, incoming, inputs)
            d_incoming, d_inputs = pull(tuple(grads))
            flat: list[Tensor | None] = [None] * len(tensors)
            for slot, value in zip(slots, d_inputs, strict=True):
                flat[slot] = value
            # out and lse are functions of the inputs: the recomputation accounts for them, so they get nothing.
            return None, None, d_incoming[0], d_incoming[1] if grad_lse is not None else None, None, None, *flat

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
            scalars, needs, *tensors = args
            count = info.batch_size
            batch = _batch_size(tensors[4], in_dims[6])
            flat = [_fold(t, d, count, batch, expand=True) for t, d in zip(tensors, in_dims[2:], strict=True)]
            grads = Backward.apply(scalars, needs, *flat)
            slots = [slot for slot, need in zip(gradient_slots(len(tensors) - 4), needs, strict=True) if need]
            unfolded = []
            for slot, grad in zip(slots, grads, strict=True):
                grad = grad.unflatten(0, (count, batch))
                original, dim = tensors[4 + slot], in_dims[6 + slot]
                if _batch_size(original, dim) == 1 and batch != 1:
                    grad = grad.sum(1, keepdim=True)
                unfolded.append(grad)
            return tuple(unfolded), (0,) * len(unfolded)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(scalars: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
            return forward_op(*arguments(scalars, tensors))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.scalars, *tensors = inputs
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*output, *tensors)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
            out, lse, *tensors = ctx.saved_tensors
            slots = gradient_slots(len(tensors))
            needs = tuple(ctx.needs_input_grad[1 + slot] for slot in slots)
            if grad_out is None:
                if grad_lse is None:
                    return (None,) * (1 + len(tensors))
                grad_out = torch.zeros_like(out)
            grads = iter(Backward.apply(ctx.scalars, needs, grad_out, grad_lse, out, lse, *tensors))
            flat: list[Tensor | None] = [None] * len(tensors)
            for slot, need in zip(slots, needs, strict=True):
                if need:
                    flat[slot] = next(grads)
            return None, *flat

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[Any, ...], scalars: tuple[Any, ...], *tensors: Tensor | None
        ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
            count = info.batch_size
            batch = _batch_size(tensors[0], in_dims[1])
            flat = [_fold(t, d, count, batch, expand=False) for t, d in zip(tensors, in_dims[1:], strict=True)]
            out, lse = Forward.apply(scalars, *flat)
            return (out.unflatten(0, (count, batch)), lse.unflatten(0, (count, batch))), (0, 0)

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        """Same positional arguments as ``forward``."""
        scalars = tuple(args[list_at + 1 :])
        return Forward.apply(scalars, *args[:list_at], *args[list_at])

    call.__name__ = name
    return call


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
