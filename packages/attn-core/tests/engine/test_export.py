"""Export: names, free axes, and the proof that the file computes the same."""

from pathlib import Path

import pytest
import torch
from torch import nn

from attn_core.engine import EngineError, ExportTarget
from attn_core.engine.export import export


class _Maps(nn.Module):
    """A map of any height and width, and its mean; at a height of ``fixed`` it is another function."""

    def __init__(self, *, fixed: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fixed = fixed

    def forward(self, image):
        maps = self.conv(image)
        if image.shape[2] == self.fixed:
            maps = 2 * maps
        return {"maps": maps, "mean": maps.mean((1, 2, 3))}


class _Pair(nn.Module):
    def forward(self, a, *others):
        return a.view(2, 3) + others[0], a.sum(0)


FREE = {0: "batch", 2: "height", 3: "width"}


def _target(module: nn.Module, **options) -> ExportTarget:
    others = ((torch.randn(3, 3, 12, 10),),)
    return ExportTarget(module, (torch.randn(2, 3, 8, 6),), "net", axes=(FREE,), others=others, **options)


@pytest.fixture(params=["onnx", "torch-export"])
def kind(request):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
    return request.param


def test_height_and_width_are_free_where_the_target_says_so(kind, tmp_path):
    report = export(_target(_Maps()), kind, tmp_path / "net")
    assert (report.any_batch, report.axes) == (True, ("height", "width"))
    assert (report.inputs, report.outputs) == (("image",), ("maps", "mean"))
    assert report.error < 1e-5


def test_a_promised_size_that_the_file_refuses_is_an_error(kind, tmp_path, capfd):
    # ONNX has no guards: where torch's exporter leaves one out, the wrong numbers give it away
    with pytest.raises(EngineError, match=r"net refuses inputs of 3×3×12×10: |net differ by 1.00e\+00 of the largest"):
        export(_target(_Maps(fixed=8)), kind, tmp_path / "net")
    assert "onnxruntime" not in capfd.readouterr().err


def test_the_file_has_the_names_of_inputs_outputs_and_axes(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    export(_target(_Maps(), input_names=("picture",), output_names=("m", "n")), "onnx", tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [value.name for value in graph.input] == ["picture"]
    assert [value.name for value in graph.output] == ["m", "n"]
    sizes = [size.dim_param or size.dim_value for size in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]


def test_a_graph_of_one_batch_size_is_written_and_said(kind, tmp_path):
    report = export(ExportTarget(_Pair(), (torch.randn(2, 3), torch.randn(2, 3)), "pair"), kind, tmp_path / "pair")
    assert not report.any_batch
    assert report.inputs == ("a", "input_1")
    assert report.outputs == ("output_0", "output_1")


def test_axes_must_be_named_for_each_input():
    target = ExportTarget(_Pair(), (torch.randn(2, 3), torch.randn(2, 3)), "pair", axes=({0: "batch"},))
    with pytest.raises(EngineError, match="pair has 2 inputs and names axes of 1"):
        export(target, "torch-export", Path("unwritten.pt2"))
