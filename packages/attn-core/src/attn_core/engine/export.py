"""Write a module as ONNX or as a torch.export program, and prove that it computes the same."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_core.engine.errors import EngineError
from attn_core.engine.package import ExportFormat, ExportTarget

_LIMIT = 1e-3  # of the largest output: float32 rounding in another order of operations stays far below


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file.
        error: Largest difference to the module's outputs, over the largest output.
        any_batch: Whether the file accepts batch sizes other than the example's.
    """

    path: Path
    error: float
    any_batch: bool


def export(target: ExportTarget, kind: ExportFormat, path: Path) -> ExportReport:
    """Write and compare.

    Raises:
        EngineError: if a package is missing, or the outputs differ by more than 1e-3 of the largest output.
    """
    module = target.module.cpu().eval()
    inputs = tuple(tensor.cpu() for tensor in target.inputs)
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if kind == "onnx":
            call = _write_onnx(module, inputs, shapes, path)
        else:
            program = torch.export.export(module, inputs, dynamic_shapes=shapes)
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
            call = lambda *tensors: _flat(loaded(*tensors))  # noqa: E731
        error = _difference(_flat(module(*inputs)), call(*inputs))
        more = tuple(torch.cat([tensor, tensor.flip(0)[:1]]) for tensor in inputs)
        try:
            error = max(error, _difference(_flat(module(*more)), call(*more)))
            any_batch = True
        except Exception:
            any_batch = False  # each runtime has its own type of complaint about a shape
    if not error <= _LIMIT:
        raise EngineError(
            f"export: outputs of {path} differ by {error:.2e} of the largest output, allowed {_LIMIT:.0e}"
        )
    return ExportReport(path, error, any_batch)


def _write_onnx(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], shapes: Any, path: Path
) -> Callable[..., list[Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise EngineError(f"export: --format onnx needs the package {error.name}; install the extra 'export'") from None
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    names = [f"input_{index}" for index in range(len(inputs))]
    torch.onnx.export(
        module, inputs, path, input_names=names, dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(*tensors: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return call


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [tensor for item in items for tensor in _flat(item)]


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    largest = max(float(tensor.abs().max()) for tensor in ours)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / max(largest, 1e-12)
