"""The contract of an operator, checked over the seeded cases of all of them."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import attn_core
from attn_core import testing
from attn_core.dispatch import has_triton
from attn_core.testing import Case, every_case, gradients, leaves, poisoned_memory, run

CASES = every_case()
OPERATORS = sorted({case.operator.__name__ for case in CASES})
FIRST = {name: next(case for case in CASES if case.operator.__name__ == name) for name in OPERATORS}
NONEMPTY = [case for case in CASES if all(t.numel() for t in leaves(*case.inputs(torch.float64)))]
VARIED = [case for case in NONEMPTY if case.varied]
VARIED_OWN = [case for case in VARIED if case.operator is not attn_core.linear]  # of operators in torch's library
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SLOW = pytest.mark.slow


def first_of_each(cases: list[Case]) -> list[Any]:
    """The first case of each operator in the ordinary run, the others with the slow tests: a trace takes seconds."""
    seen: set[Any] = set()
    marked = []
    for case in cases:
        marked.append(pytest.param(case, marks=[pytest.mark.slow] if case.operator in seen else []))
        seen.add(case.operator)
    return marked


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "linear"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_backend_has_the_same_schema(name: str, direction: str) -> None:
    schemas = {}
    for backend in ("torch", "triton") if has_triton() else ("torch",):
        if importlib.util.find_spec(f"attn_core.ops.{name}.{backend}_backend") is None:
            continue
        importlib.import_module(f"attn_core.ops.{name}.{backend}_backend")
        library = getattr(torch.ops.attn_core, f"{name}_{backend}_{direction}").default
        schemas[backend] = str(library._schema).partition("(")[2]
    assert len({schema.replace(f"{name}_triton", f"{name}_torch") for schema in schemas.values()}) == 1, schemas


@pytest.mark.parametrize("name", [name for name in attn_core.__all__ if hasattr(attn_core, name)])
def test_every_operator_has_cases(name: str) -> None:
    if "backend" in inspect.signature(getattr(attn_core, name)).parameters and name != "use_backend":
        assert name in OPERATORS


# float64 tells what is computed, bfloat16 how; the other two with an operator's first case, and with the slow tests.
IN_DTYPES = [
    pytest.param(case, dtype, id=f"{case}-{dtype}", marks=() if own or case is FIRST[case.operator.__name__] else SLOW)
    for case in CASES
    for dtype, own in zip(DTYPES, (True, False, True, False), strict=True)
]


@pytest.mark.parametrize(("case", "dtype"), IN_DTYPES)
def test_output_and_gradients_equal_the_float64_reference(case: Case, dtype: torch.dtype) -> None:
    testing.assert_matches_reference(case, dtype, "torch")


@pytest.mark.parametrize("case", NONEMPTY, ids=str)
def test_uninitialized_memory_and_nondeterministic_kernels_are_never_used(case: Case) -> None:
    results = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        with poisoned_memory():
            outputs = run(case, args, kwargs, "torch")
            results.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    for first, second in zip(*results, strict=True):
        assert not first.isnan().any()
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_any_strides_of_every_tensor_give_the_same(case: Case) -> None:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = case.build(dtype, device)
        return [testing.restrided(a) for a in args], {name: testing.restrided(a) for name, a in kwargs.items()}

    moved = Case(case.operator, case.name, build)
    assert all(not x.is_contiguous() for x in leaves(*moved.inputs(torch.float64)))
    for dtype in (torch.float64, torch.bfloat16):
        testing.assert_matches_reference(moved, dtype, "torch")


def _weighted(tensors: Iterable[Tensor], weights: list[Tensor]) -> Tensor:
    """Sum of all elements, each with its weight; infinities count as zeros."""
    pairs = zip(tensors, weights, strict=True)
    return torch.stack([(torch.where(x.isinf(), 0.0, x) * weight).sum() for x, weight in pairs]).sum()


def _slope(function: Callable[[], Tensor], directions: dict[Tensor, Tensor]) -> Tensor:
    """Finite difference of ``function`` where its leaves move in place along their directions, and back."""

    def move(step: float) -> None:
        with torch.no_grad():
            for x, direction in directions.items():
                x.add_(direction, alpha=step)

    move(1e-6)
    right = function().detach()
    move(-2e-6)
    left = function().detach()
    move(1e-6)
    return (right - left) / 2e-6


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_gradients_and_second_derivatives_are_those_of_finite_differences(case: Case) -> None:
    """Of the outputs weighted at random, and of the gradients weighted at random, by inputs and weights of outputs.

    The former along a random direction of each input, as gradcheck's fast mode goes; the latter along one of
    them all, in which each has a like share: gradgradcheck asks every pair anew, in five times the time.
    """
    args, kwargs = case.inputs(torch.float64)
    inputs = leaves(args, kwargs)
    weights = [torch.randn_like(out, requires_grad=True) for out in run(case, args, kwargs, "torch")]
    of_gradients = [torch.randn_like(x) for x in inputs]

    def total() -> Tensor:
        return _weighted(run(case, args, kwargs, "torch"), weights)

    def grad(y: Tensor, by: list[Tensor], graph: bool = True) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, by, create_graph=graph, materialize_grads=True)

    first, both = grad(total(), inputs), [*inputs, *weights]
    second = grad(_weighted(first, of_gradients), both)
    # a gradient alone, where those of the others are undefined, and the others have their parts of the whole
    parts = [
        grad(_weighted(first[part], of_gradients[part]), both) for part in (slice(1), slice(1, None)) if first[part]
    ]
    for whole, *added in zip(second, *parts, strict=True):
        torch.testing.assert_close(sum(added), whole, rtol=1e-9, atol=1e-9)

    for x, gradient in zip(inputs, first, strict=True):
        direction = torch.randn_like(x)
        torch.testing.assert_close(
            _slope(total, {x: direction}), (gradient * direction).sum().detach(), rtol=1e-5, atol=1e-6
        )
    directions = {x: torch.randn_like(x) / g.norm().detach().clamp(min=0.01) for x, g in zip(both, second, strict=True)}
    expected = _weighted(second, list(directions.values())).detach()
    actual = _slope(lambda: _weighted(grad(total(), inputs, graph=False), of_gradients), directions)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_lse_alone_and_output_alone_have_the_reference_gradient(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    inputs = leaves(args, kwargs)
    for i in range(len(run(case, args, kwargs))):
        expected = gradients((run(case, args, kwargs, "reference")[i],), inputs)
        for actual, reference in zip(gradients((run(case, args, kwargs, "torch")[i],), inputs), expected, strict=True):
            assert testing.relative_error(actual, reference) <= 2e-10


def _library_calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """The library operators that one forward and backward reach, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "attn_core":
                calls.append((func, tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, args)))
            return func(*args, **(kwargs or {}))

    args, kwargs = case.inputs(torch.float64)
    with Recorder():
        gradients(run(case, args, kwargs, "torch"), leaves(args, kwargs))
    return calls


@pytest.mark.parametrize("case", first_of_each(VARIED_OWN), ids=str)
def test_library_operators_pass_opcheck(case: Case) -> None:
    calls = _library_calls(case)
    assert {func.name().rsplit("_", 1)[1] for func, _ in calls} == {"forward", "backward"}
    for func, args in calls:
        torch.library.opcheck(func, args)


@pytest.mark.compile
@pytest.mark.parametrize("case", first_of_each(VARIED), ids=str)
def test_compiles_to_one_graph_with_dynamic_shapes(case: Case) -> None:
    torch.compiler.reset()

    def function(args: list[Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        return run(case, args, kwargs)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    args, kwargs = case.inputs(torch.float64)
    inputs = leaves(args, kwargs)
    eager, graph = function(args, kwargs), compiled(args, kwargs)
    pairs = [*zip(eager, graph, strict=True), *zip(gradients(eager, inputs), gradients(graph, inputs), strict=True)]
    for expected, actual in pairs:
        assert testing.relative_error(actual, expected) <= 1e-10


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_through_inductor(name: str) -> None:
    torch.compiler.reset()
    case = FIRST[name]
    args, kwargs = case.inputs(torch.float32)
    compiled = torch.compile(lambda args, kwargs: run(case, args, kwargs), fullgraph=True)
    expected = run(case, args, kwargs)
    actual = compiled(args, kwargs)
    for a, b in zip(actual, expected, strict=True):
        assert testing.relative_error(a, b) <= 2e-5


class _Module(nn.Module):
    def __init__(self, case: Case, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.case, self.kwargs = case, kwargs

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        return run(self.case, list(args), self.kwargs)


@pytest.mark.parametrize("case", first_of_each(VARIED), ids=str)
def test_exported_graph_is_plain_torch_and_gives_the_same(case: Case) -> None:
    args, kwargs = tree_map(
        lambda a: a.detach() if isinstance(a, Tensor) else a, case.inputs(torch.float64), is_leaf=torch.is_tensor
    )
    module = _Module(case, kwargs)
    program = torch.export.export(module, tuple(args))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("attn_core" in target for target in targets)
    for actual, expected in zip(program.module()(*args), module(*args), strict=True):
        assert testing.relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_func_grad_equals_autograd_and_vmap_equals_a_loop(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)

    def loss(x: Tensor) -> Tensor:
        outputs = run(case, [x, *(a.detach() if isinstance(a, Tensor) else a for a in args[1:])], kwargs)
        return sum((torch.where(out.isinf(), 0.0, out).sin().sum() for out in outputs), torch.zeros(()))

    x = args[0].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    assert testing.relative_error(torch.func.grad(loss)(x.detach()), expected) <= 1e-10
    batch = torch.stack([x.detach(), 2 * x.detach(), -x.detach()])
    looped = torch.stack([torch.func.grad(loss)(one) for one in batch])
    assert testing.relative_error(torch.func.vmap(torch.func.grad(loss))(batch), looped) <= 1e-10


@pytest.mark.parametrize("case", [case for case in VARIED if case.operator is not attn_core.linear], ids=str)
def test_vmap_over_every_single_argument_equals_a_loop(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    positions = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    for position in positions:
        batch = torch.stack([args[position].detach(), args[position].detach().neg()])

        def value(x: Tensor, position: int = position) -> tuple[Tensor, ...]:
            swapped = [x if i == position else a for i, a in enumerate(args)]
            return run(case, [a.detach() if isinstance(a, Tensor) else a for a in swapped], kwargs)

        for actual, expected in zip(
            torch.func.vmap(value)(batch), zip(*(value(x) for x in batch), strict=True), strict=True
        ):
            assert testing.relative_error(actual, torch.stack(expected)) <= 1e-10


SHARED = [
    case
    for case in VARIED
    # a weight has no batch dimension; the heads of that table's case are as many as its images
    if case.operator is not attn_core.linear and str(case) != "neighborhood_attention-truncated, everything"
]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_operands_that_a_vmap_shares_get_the_sum_of_the_gradients(case: Case) -> None:
    given = case.inputs(torch.float64)
    images = given[0][0].shape[0] if isinstance(given[0][0], Tensor) else 0

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach()[:1] if x.ndim and x.shape[0] == images else x.detach()

    (first, *args), kwargs = tree_map(one, given)
    shared = [
        x.requires_grad_() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()
    ]
    batch = torch.stack([first, -first, first / 2])

    def loss(outputs: Iterable[Tensor]) -> Tensor:
        return sum((torch.where(out.isinf(), 0.0, out).sin().sum() for out in outputs), torch.zeros(()))

    together = loss(torch.func.vmap(lambda x: run(case, [x, *args], kwargs))(batch))
    looped = sum((loss(run(case, [x, *args], kwargs)) for x in batch), torch.zeros(()))
    pairs = zip(*(torch.autograd.grad(total, shared, allow_unused=True) for total in (together, looped)), strict=True)
    for actual, expected in pairs:
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            assert testing.relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "linear"])
def test_forward_mode_raises_instead_of_returning_zero(name: str) -> None:
    args, kwargs = FIRST[name].inputs(torch.float64)
    rest = [a.detach() if isinstance(a, Tensor) else a for a in args[1:]]
    q = args[0].detach()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: run(FIRST[name], [q, *rest], kwargs), (q,), (q,))


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_runs_in_its_dtype(name: str) -> None:
    args, kwargs = FIRST[name].inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(FIRST[name], args, kwargs)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPERATORS)
def test_checkpointing_leaves_gradients_alone(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    case = FIRST[name]
    args, kwargs = case.inputs(torch.float64)
    inputs = leaves(args, kwargs)
    direct = gradients(run(case, args, kwargs), inputs)
    again = gradients(checkpoint(lambda *a: run(case, list(a), kwargs), *args, use_reentrant=False), inputs)
    for actual, expected in zip(again, direct, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_backward_after_an_in_place_change_of_an_input_raises(name: str) -> None:
    args, kwargs = FIRST[name].inputs(torch.float64)
    q = args[0].detach().clone().requires_grad_()
    doubled = q * 2
    out = run(FIRST[name], [doubled, *args[1:]], kwargs)[0]
    doubled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
