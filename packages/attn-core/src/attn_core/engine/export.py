"""Write a module as ONNX or as a torch.export program, and prove that it computes the same."""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.engine.errors import EngineError
from attn_core.engine.package import ExportFormat, ExportTarget

_LIMIT = 1e-3  # of the largest output: float32 rounding in another order of operations stays far below
_BATCH = {0: "batch"}

_Call = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file.
        error: Largest difference to the module's outputs, over the largest output.
        any_batch: Whether the file accepts batch sizes other than the example's, 1 among them.
        axes: Names of the other axes of free size.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
    """

    path: Path
    error: float
    any_batch: bool
    axes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Refused(Exception):
    """A written file does not take inputs of these sizes."""


def export(target: ExportTarget, kind: ExportFormat, path: Path) -> ExportReport:
    """Write and compare, with the example inputs, batches of other sizes, and ``target.others``.

    Raises:
        EngineError: if a package is missing, the outputs differ by more than 1e-3 of the largest output, or the file
            refuses a size that the target promises.
    """
    module = target.module.cpu().eval()
    inputs = tuple(tensor.cpu() for tensor in target.inputs)
    axes = target.axes or tuple(_BATCH if tensor.ndim else {} for tensor in inputs)
    if len(axes) != len(inputs):
        raise EngineError(f"export: {target.name} has {len(inputs)} inputs and names axes of {len(axes)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), _quiet():
        expected = module(*inputs)
        names = target.input_names or _parameters(module, len(inputs))
        outputs = target.output_names or _output_names(expected)
        if kind == "onnx":
            call = _write_onnx(module, inputs, axes, path, names, outputs)
        else:
            call = _write_program(module, inputs, axes, path)
        error = _difference(_flat(expected), call(*inputs))
        for other in target.others:
            wanted = _flat(module(*other))
            try:
                error = max(error, _difference(wanted, call(*other)))
            except _Refused as refusal:
                shapes = ", ".join("×".join(map(str, tensor.shape)) for tensor in other)
                raise EngineError(f"export: {path} refuses inputs of {shapes}: {refusal}") from None
        any_batch = any(0 in own for own in axes)
        for batch in _other_batches(inputs, axes):
            try:
                wanted = _flat(module(*batch))
            except RuntimeError:  # the network itself is made for one number of samples
                any_batch = False
                continue
            try:
                error = max(error, _difference(wanted, call(*batch)))
            except _Refused:
                any_batch = False
    if not error <= _LIMIT:
        raise EngineError(
            f"export: outputs of {path} differ by {error:.2e} of the largest output, allowed {_LIMIT:.0e}"
        )
    free = dict.fromkeys(name for own in axes for axis, name in own.items() if axis) if target.others else ()
    return ExportReport(path, error, any_batch, tuple(free), names, outputs)


def _other_batches(inputs: tuple[Tensor, ...], axes: tuple[Mapping[int, str], ...]) -> Iterator[tuple[Tensor, ...]]:
    """The inputs with one sample more, and with one sample alone."""
    pairs = list(zip(inputs, axes, strict=True))
    yield tuple(torch.cat([tensor, tensor.flip(0)[:1]]) if 0 in own else tensor for tensor, own in pairs)
    yield tuple(tensor[:1] if 0 in own else tensor for tensor, own in pairs)


def _write_program(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[Mapping[int, str], ...], path: Path
) -> _Call:
    shapes = tuple(dict.fromkeys(own, torch.export.Dim.AUTO) for own in axes)
    program = torch.export.export(module, inputs, dynamic_shapes=_as_called(module, shapes))
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    # its guards raise AssertionError; an operator in the graph that does not fit, RuntimeError
    return _refusing(lambda *tensors: _flat(loaded(*tensors)), AssertionError, RuntimeError)


def _refusing(call: _Call, *errors: type[Exception]) -> _Call:
    """``call``, whose complaints about sizes become `_Refused`."""

    def checked(*tensors: Tensor) -> list[Tensor]:
        try:
            return call(*tensors)
        except errors as error:
            raise _Refused((str(error).strip().splitlines() or [type(error).__name__])[0]) from error

    return checked


def _write_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    axes: tuple[Mapping[int, str], ...],
    path: Path,
    names: tuple[str, ...],
    outputs: tuple[str, ...],
) -> _Call:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it
        from onnxruntime.capi import onnxruntime_pybind11_state as runtime  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise EngineError(f"export: --format onnx needs the package {error.name}; install the extra 'export'") from None

    def write(shapes: Any) -> None:
        torch.onnx.export(
            module, inputs, path, input_names=list(names), output_names=list(outputs),
            dynamic_shapes=_as_called(module, shapes),
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip

    try:
        write(tuple(dict(own) for own in axes))
    except torch.onnx.OnnxExporterError:
        # A named axis must be free; the network fixes one of them, so let torch find out which ones are.
        write(tuple(dict.fromkeys(own, torch.export.Dim.AUTO) for own in axes))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a size that is refused is our business to report
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(*tensors: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return _refusing(call, runtime.Fail, runtime.InvalidArgument, runtime.RuntimeException)


def _as_called(module: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry for each parameter of ``forward``: those of ``*others`` stand in a tuple of their own."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    fixed = sum(p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters)
    return shapes if len(shapes) <= fixed else (*shapes[:fixed], shapes[fixed:])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' own log lines are about their inner life."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _parameters(module: nn.Module, count: int) -> tuple[str, ...]:
    """Names of the inputs, as ``forward`` calls them; a variadic one is numbered."""
    named = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(named[index] if index < len(named) else f"input_{index}" for index in range(count))


def _output_names(output: Any) -> tuple[str, ...]:
    if isinstance(output, Tensor):
        return ("output",)
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        return tuple(map(str, output))
    return tuple(f"output_{index}" for index in range(len(_flat(output))))


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output
    return [tensor for item in items for tensor in _flat(item)]


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    largest = max((float(tensor.abs().max()) for tensor in ours if tensor.numel()), default=0.0)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max((float((a.float() - b.float()).abs().max()) for a, b in pairs), default=0.0) / max(largest, 1e-12)
