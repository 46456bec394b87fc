# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false
# torch types Function.backward and vmap as (ctx, *args) and vjp's result as a union over has_aux.
"""Registration of a fused operator with torch, done once for every operator and backend.

An operator's :class:`Definition` holds what its backends share: the named tuple of its arguments, its equation
(``reference``), the shapes of its results (``fake``). A backend adds ``forward(a)`` and ``backward(grads, kept, a,
needs)``, which see that tuple of tensors and Python scalars and know nothing of autograd; :meth:`Definition.register`
turns the pair into a differentiable callable.

A plain eager call, which nobody derives, transforms or watches, goes straight to ``forward``. All others take the one
pattern that was measured to survive ``torch.compile(fullgraph=True)``, ``torch.export``, ``torch.func.grad``, ``vmap``
and double backward:

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
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from attn_core import torch_internals

# One kernel for every device: a composite key would let autograd record what happens inside.
DEVICE_KEYS = ("CPU", "CUDA", "MPS", "XPU")

A = TypeVar("A", bound=tuple[Any, ...])  # an operator's Arguments
Grads = tuple[Tensor | None, ...]

_library = torch.library.Library("attn_core", "FRAGMENT")


def token_major(q: Tensor, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """Uninitialized (B, H, N, D) tensor whose memory is (B, N, H, D), so that joining the heads again is a view."""
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def token_major_copy(x: Tensor) -> Tensor:
    """``x`` (B, H, N, D) itself if its memory is (B, N, H, D), else a copy that is."""
    _, heads, tokens, width = x.shape
    if x.stride() == (tokens * heads * width, width, heads * width, 1):
        return x
    order = x.transpose(1, 2)
    return x if order.is_contiguous() else order.contiguous().transpose(1, 2)


@dataclass(frozen=True)
class Definition(Generic[A]):
    """What the backends of an operator share.

    Attributes:
        arguments: named tuple of the arguments; its annotations give the schema. Single tensors come first and may be
            None, then at most one list of tensors, then Python scalars. Every tensor, results too, has a leading batch
            dimension of size B or 1, where B is that of the first tensor: parameters get a dimension of 1, and under
            ``vmap`` meet one value per batch entry.
        fake: shapes, dtypes and strides of ``forward``'s results, uninitialized.
        reference: outputs by the equation, differentiable by autograd; used for double backward.
        differentiable: names of the arguments with a gradient, the list's last if it has one.
        token_major_gradients: those of them whose gradient is laid out (B, N, H, D) in memory; others are contiguous.
        residuals: the last results, which are kept for backward and not returned to the caller.
        keeps_outputs: False where backward needs the residuals only; the outputs are then not passed to it.
    """

    name: str
    arguments: Any
    fake: Callable[[A], Any]
    reference: Callable[[A], Any]
    differentiable: tuple[str, ...]
    token_major_gradients: tuple[str, ...] = ()
    residuals: int = 0
    keeps_outputs: bool = True

    def register(
        self,
        backend: str,
        forward: Callable[[A], Any],
        backward: Callable[[Grads, tuple[Tensor, ...], A, Sequence[bool]], Sequence[Tensor | None]],
        fake: Callable[[A], Any] | None = None,
        exported: Callable[[A], Any] | None = None,
    ) -> Callable[[A], Any]:
        """Make one differentiable callable of a backend's pair of functions.

        Args:
            forward: arguments → results, one tensor or a tuple, none of them an argument or a view of one.
            backward: gradients of the outputs, kept results, arguments, needs → gradients of the ``differentiable``
                arguments, in that order (of each tensor of the list; None for an absent tensor). The first output's
                gradient is always a tensor; another's is None where that output was not used. A gradient whose flag
                in ``needs`` is False may be None. Sums over broadcast dimensions and casts are done here.
            fake: where this backend's results are not those of the definition.
            exported: what a graph made by ``torch.export`` holds instead.
        """
        return _register(f"{self.name}_{backend}", self, forward, backward, fake or self.fake, exported)


@dataclass(frozen=True)
class Operator:
    """One backend of an operator, registered: Python functions, library operators, and what ties them together."""

    definition: Definition[Any]
    run_forward: Callable[[Any], tuple[Tensor, ...]]
    run_backward: Callable[..., list[Tensor]]
    forward: Callable[..., Any]
    backward: Callable[..., list[Tensor]]
    outputs: int  # results that the caller sees; those behind them are kept for backward
    list_at: int  # position of the list of tensors, or of the first scalar: single tensors come before it
    has_list: bool
    differentiable: tuple[int, ...]  # positions of single tensors with a gradient
    list_differentiable: bool

    def arguments(self, scalars: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Any:
        """The operator's arguments from flat tensors (the list's last) and scalars."""
        listed = (list(tensors[self.list_at :]),) if self.has_list else ()
        return self.definition.arguments(*tensors[: self.list_at], *listed, *scalars)

    def tensors(self, a: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """The flat tensors among the arguments."""
        return (*a[: self.list_at], *a[self.list_at]) if self.has_list else a[: self.list_at]

    def slots(self, count: int) -> list[int]:
        """Positions, among ``count`` flat tensors, of those with a gradient."""
        return [*self.differentiable, *(range(self.list_at, count) if self.list_differentiable else ())]

    def needed(self, count: int, needs: Sequence[bool]) -> list[int]:
        """Positions, among ``count`` flat tensors, of those whose gradient is asked for."""
        return [slot for slot, need in zip(self.slots(count), needs, strict=True) if need]

    def kept(self, results: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of ``forward``'s results that ``backward`` gets."""
        return results if self.definition.keeps_outputs else results[self.outputs :]

    def is_token_major(self, slot: int) -> bool:
        """Whether the gradient of the flat tensor ``slot`` is laid out (B, N, H, D) in memory."""
        names = self.definition.arguments._fields
        return slot < self.list_at and names[slot] in self.definition.token_major_gradients


OPERATORS: dict[str, Operator] = {}


# Whole: closures over one schema: what is counted at the top is what each of them slices by.
def _register(
    name: str,
    definition: Definition[A],
    forward: Callable[[A], Any],
    backward: Callable[..., Sequence[Tensor | None]],
    fake: Callable[[A], Any],
    exported: Callable[[A], Any] | None,
) -> Callable[[A], Any]:
    arguments: Any = definition.arguments
    names: tuple[str, ...] = arguments._fields
    kinds = [get_type_hints(arguments)[argument] for argument in names]
    list_at = next((i for i, kind in enumerate(kinds) if kind not in (Tensor, Tensor | None)), len(kinds))
    has_list = list_at < len(kinds) and kinds[list_at] in (Sequence[Tensor], list[Tensor])
    single = [argument for argument in definition.differentiable if names.index(argument) < list_at]

    schema = torch.library.infer_schema(_prototype(names, kinds, forward), mutates_args=())
    inner, returned = schema[1:].split(") -> ")
    results = returned.count("Tensor")
    outputs = results - definition.residuals
    kept = results if definition.keeps_outputs else definition.residuals
    leading = [f"Tensor{'?' if i else ''} grad_{i}" for i in range(outputs)] + [f"Tensor kept_{i}" for i in range(kept)]

    def run_backward(grads: Grads, saved: tuple[Tensor, ...], a: A, needs: Sequence[bool]) -> list[Tensor]:
        gradients = backward(grads, saved, a, needs)
        flat = operator.tensors(a)
        found = []
        for slot, gradient, need in zip(operator.slots(len(flat)), gradients, needs, strict=True):
            tensor = flat[slot]
            if need and tensor is not None and gradient is not None:
                found.append(_fitted(gradient, tensor, operator.is_token_major(slot)))
        return found

    def fake_backward(*args: Any) -> list[Tensor]:
        *_, needs = args
        flat = operator.tensors(args[outputs + kept : -1])
        slots = operator.needed(len(flat), needs)
        return [empty_gradient(tensor, operator.is_token_major(i)) for i in slots if (tensor := flat[i]) is not None]

    operator = OPERATORS[name] = Operator(
        definition=definition,
        run_forward=lambda a: as_tuple(forward(a)),
        run_backward=run_backward,
        forward=_define(
            f"{name}_forward", schema, lambda *args: forward(arguments(*args)), lambda *args: fake(arguments(*args))
        ),
        backward=_define(
            f"{name}_backward",
            f"({', '.join(leading)}, {inner}, bool[] needs) -> Tensor[]",
            lambda *args: run_backward(
                args[:outputs], args[outputs : outputs + kept], arguments(*args[outputs + kept : -1]), args[-1]
            ),
            fake_backward,
        ),
        outputs=outputs,
        list_at=list_at,
        has_list=has_list,
        differentiable=tuple(names.index(argument) for argument in single),
        list_differentiable=len(single) < len(definition.differentiable),
    )

    def call(a: A) -> Any:
        if torch.compiler.is_compiling():
            if exported is not None and torch.compiler.is_exporting():
                return exported(a)
            a = arguments(*_distinct(a))
        else:
            if is_plain(operator.tensors(a)):
                results = _undisturbed(forward, a)
                if outputs == results_of_forward:
                    return results
                return results[0] if outputs == 1 else results[:outputs]
        results = Forward.apply(name, tuple(a[list_at + has_list :]), *operator.tensors(a))
        return results[0] if outputs == 1 else results[:outputs]

    results_of_forward = results
    return call


def _prototype(names: Sequence[str], kinds: Sequence[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of that signature, for torch to infer a schema from."""

    def prototype() -> None: ...

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in zip(names, kinds, strict=True)
    ]
    prototype.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        parameters, return_annotation=inspect.signature(forward).return_annotation
    )
    return prototype


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

    def run(*args: Any) -> Any:
        # The library operator itself has no gradient: autograd sees the Function around it alone. Autocast has chosen
        # the dtype of the data already, and would round what is float32 on purpose.
        with torch.no_grad(), torch_internals.without_autocast():
            return function(*args)

    for key in DEVICE_KEYS:
        _library.impl(name, run, key)
    torch.library.register_fake(f"attn_core::{name}", fake, lib=_library)
    return getattr(torch.ops.attn_core, name).default


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nobody derives, transforms or watches this call: then it goes straight to the backend's Python."""
    if torch_internals.is_watched():
        return False
    ordinary, derivable = torch_internals.ORDINARY, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in ordinary or tensor.is_meta or (derivable and tensor.requires_grad)
        ):
            return False
    return True


def _undisturbed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` without autocast, which has chosen the dtype of the data already."""
    if torch_internals.is_autocast_on():
        with torch_internals.without_autocast():
            return function(*args)
    return function(*args)


def _fitted(gradient: Tensor, tensor: Tensor, token_major_memory: bool) -> Tensor:
    """The gradient in its tensor's shape and dtype: summed over what was broadcast."""
    if gradient.shape != tensor.shape:
        gradient = gradient.sum_to_size(tensor.shape)
    if gradient.dtype != tensor.dtype:
        gradient = gradient.to(tensor.dtype)
    return gradient if token_major_memory else gradient.contiguous()


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


class _Positional(inspect.Signature):
    """``Function.apply`` inspects and binds the arguments of ``forward`` in each call; ours are positional already."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """No argument has a default."""


# Both Functions are module-level and find their operator by name: torch.compile cannot trace a Function that it
# reaches through a closure.


class Forward(torch.autograd.Function):
    @staticmethod
    def forward(name: str, scalars: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """All results, those kept for backward included."""
        operator = OPERATORS[name]
        a = operator.arguments(scalars, tensors)
        if not torch.compiler.is_compiling() and is_plain(tensors):
            return _undisturbed(operator.run_forward, a)
        return as_tuple(operator.forward(*a))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what backward needs; results that only backward sees are not differentiable."""
        ctx.name, ctx.scalars, *tensors = inputs
        operator = OPERATORS[ctx.name]
        ctx.set_materialize_grads(False)
        if len(output) > operator.outputs:
            ctx.mark_non_differentiable(*output[operator.outputs :])
        kept = operator.kept(output)
        ctx.kept = len(kept)
        ctx.empty_out = (
            None if operator.definition.keeps_outputs else (output[0].shape, output[0].dtype, output[0].device)
        )
        ctx.save_for_backward(*kept, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the flat tensors, by :class:`Backward`; None where nobody asks."""
        operator = OPERATORS[ctx.name]
        saved = ctx.saved_tensors
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        slots = operator.slots(len(tensors))
        needs = tuple(ctx.needs_input_grad[2 + slot] for slot in slots)
        incoming = list(grads[: operator.outputs])
        if all(grad is None for grad in incoming):
            return (None,) * (2 + len(tensors))
        if incoming[0] is None:
            if ctx.empty_out is None:
                incoming[0] = torch.zeros_like(kept[0])
            else:
                shape, dtype, device = ctx.empty_out
                incoming[0] = torch.zeros(shape, dtype=dtype, device=device)
        if not torch.compiler.is_compiling() and is_plain((*incoming, *kept, *tensors)):
            a = operator.arguments(ctx.scalars, tensors)
            results = _undisturbed(operator.run_backward, tuple(incoming), kept, a, needs)
        else:
            results = list(Backward.apply(ctx.name, ctx.scalars, needs, ctx.kept, *incoming, *kept, *tensors))
        flat: list[Tensor | None] = [None] * len(tensors)
        for slot, need in zip(slots, needs, strict=True):
            if need:
                flat[slot] = results.pop(0)
        return None, None, *flat

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], name: str, scalars: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped dimension into the batch, and run once."""
        count, batch = info.batch_size, _batch_size(tensors[0], in_dims[2])
        # With one image, a tensor of batch 1 may be data as well as a parameter: only a parameter may stay alone.
        flat = [_fold(t, dim, count, batch, expand=batch == 1) for t, dim in zip(tensors, in_dims[2:], strict=True)]
        if flat[0] is not None and flat[0].shape[0] != count * batch:  # the first tensor says how many there are
            flat[0] = flat[0].expand(count * batch, *flat[0].shape[1:])
        results = Forward.apply(name, scalars, *flat)
        return tuple(result.unflatten(0, (count, batch)) for result in results), (0,) * len(results)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str, scalars: tuple[Any, ...], needs: tuple[bool, ...], kept: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of the flat tensors whose flag in ``needs`` is set."""
        operator = OPERATORS[name]
        leading = operator.outputs + kept
        arguments = operator.arguments(scalars, tensors[leading:])
        return tuple(operator.backward(*tensors[:leading], *arguments, list(needs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004  torch's signature
        """Keep the incoming gradients and the arguments, not the results: the reference makes its own."""
        ctx.name, ctx.scalars, ctx.needs, ctx.kept, *tensors = inputs
        outputs = OPERATORS[ctx.name].outputs
        ctx.save_for_backward(*tensors[:outputs], *tensors[outputs + ctx.kept :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The second derivative, by differentiating the reference's gradient."""
        operator = OPERATORS[ctx.name]
        saved = ctx.saved_tensors
        incoming, tensors = saved[: operator.outputs], saved[operator.outputs :]
        slots = operator.needed(len(tensors), ctx.needs)
        used = [i for i, grad in enumerate(incoming) if grad is not None]

        def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
            flat = list(tensors)
            for slot, value in zip(slots, inputs, strict=True):
                flat[slot] = value
            results = as_tuple(operator.definition.reference(operator.arguments(ctx.scalars, flat)))
            return tuple(results[i] for i in used)

        def gradients(incoming: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            _, pull = torch.func.vjp(outputs, *inputs)
            return pull(incoming)

        _, pull = torch.func.vjp(gradients, tuple(incoming[i] for i in used), tuple(tensors[slot] for slot in slots))
        d_incoming, d_inputs = pull(tuple(grads))
        first: list[Tensor | None] = [None] * operator.outputs
        for i, value in zip(used, d_incoming, strict=True):
            first[i] = value
        flat: list[Tensor | None] = [None] * len(tensors)
        for slot, value in zip(slots, d_inputs, strict=True):
            flat[slot] = value
        # Kept results are functions of the inputs: the recomputation accounts for them, so they get nothing.
        return None, None, None, None, *first, *(None,) * ctx.kept, *flat

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        name: str,
        scalars: tuple[Any, ...],
        needs: tuple[bool, ...],
        kept: int,
        *args: Any,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped dimension into the batch, and sum each gradient per entry, not over entries."""
        dims = in_dims[4:]
        leading = OPERATORS[name].outputs + kept
        count, batch = info.batch_size, _batch_size(args[leading], dims[leading])
        flat = [_fold(t, dim, count, batch, expand=True) for t, dim in zip(args, dims, strict=True)]
        grads = Backward.apply(name, scalars, needs, kept, *flat)
        unfolded = []
        for slot, grad in zip(OPERATORS[name].needed(len(args) - leading, needs), grads, strict=True):
            grad = grad.unflatten(0, (count, batch))
            if _batch_size(args[leading + slot], dims[leading + slot]) == 1 and batch != 1:
                grad = grad.sum(1, keepdim=True)
            unfolded.append(grad)
        return tuple(unfolded), (0,) * len(unfolded)


for _function in (Forward, Backward):
    _function.forward.__signature__ = _Positional.from_callable(_function.forward)  # pyright: ignore[reportFunctionMemberAccess]


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """One tensor or several as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def empty_gradient(tensor: Tensor, token_major_memory: bool) -> Tensor:
    """Uninitialized gradient of an operand: (B, N, H, D) in memory, as q, k and v have it, or contiguous."""
    if token_major_memory:
        batch, heads, tokens, width = tensor.shape
        return token_major(tensor, batch, heads, tokens, width)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _batch_size(tensor: Tensor | None, dim: int | None) -> int:
    """Size of the leading dimension once the vmapped one is taken away."""
    assert tensor is not None
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _fold(tensor: Tensor | None, dim: int | None, count: int, batch: int, *, expand: bool) -> Tensor | None:
    """Fold a vmapped dimension of size ``count`` into the batch; without ``expand``, unbatched parameters stay."""
    if tensor is None:
        return None
    if dim is None:
        if tensor.shape[0] == 1 and not expand:
            return tensor
        tensor = tensor.expand(count, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.expand(count, batch, *tensor.shape[2:]).flatten(0, 1)
