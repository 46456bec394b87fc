"""The ahead-of-time gate: what it refuses, that its cases reach every shipped tile, and that a subset passes."""

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_core import aot
from attn_core.kernels.launch import Launch, Tile, record
from attn_core.kernels.machine_code import Loop

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def backend(operator: str) -> Any:
    return importlib.import_module(f"attn_core.ops.{operator}.triton_backend")


def launches(operator: str, architecture: str) -> list[Launch]:
    with record(architecture) as recorded:
        for _, run in backend(operator).aot_cases(quick=False):
            run()
    return recorded


def test_every_operator_with_kernels_is_found() -> None:
    assert {"attention", "block_attention"} <= set(aot.operators())


@pytest.mark.parametrize("operator", ["attention", "block_attention", "neighborhood_attention"])
@pytest.mark.parametrize("column", [0, 1], ids=["sm_80", "sm_90"])
def test_cases_reach_every_tile_of_the_tables(operator: str, column: int) -> None:
    reached = {
        (launch.kernel.__name__, *(launch.constants.get(name) for name in ("BM", "BN")), launch.warps, launch.stages)
        for launch in launches(operator, ("sm_80", "sm_90")[column])
    }
    module = importlib.import_module(f"attn_core.ops.{operator}.triton_config")
    shipped: list[tuple[str, Tile]] = [
        (key if isinstance(key, str) else key[0], tiles[column])
        for key, by_width in module.TILES_16_BIT.items()
        for tiles in by_width.values()
    ]
    shipped += [
        (key if isinstance(key, str) else key[0], tile if isinstance(tile, Tile) else tile[column])
        for key, by_width in module.TILES_FLOAT32.items()
        for tile in by_width.values()
    ]
    for kernel, tile in shipped:
        assert (f"{kernel}_kernel", tile.rows, tile.columns, tile.warps, tile.stages) in reached, (kernel, tile)


def test_recording_starts_nothing_and_ends_with_its_block() -> None:
    assert launches("attention", "sm_90")
    from attn_core.kernels import launch

    assert launch._recorder is None


# Rows and columns of maps as images and crops give them: multiples of 16, of 2, odd ones.
SIDES = [
    *((32, 40), (33, 33), (40, 64), (48, 84), (50, 56), (56, 56), (57, 61), (60, 80), (64, 64), (64, 65)),
    *((70, 70), (75, 100), (80, 80), (84, 50), (90, 100), (96, 96), (100, 101), (112, 112), (120, 160), (128, 128)),
]
RUNS: dict[str, Callable[[Any, int, int], None]] = {
    "attention": lambda run, y, x: run(torch.bfloat16, 64, y * x, y * x),
    "attention, causal": lambda run, y, x: run(torch.bfloat16, 64, y * x, y * x, causal="lower_right"),
    "attention, bias": lambda run, y, x: run(torch.bfloat16, 64, y * x, y * x, bias=(1, 8, y * x, y * x)),
    "attention, axes": lambda run, y, x: run(torch.bfloat16, 32, 300, axes=(y, x)),
    "block_attention": lambda run, y, x: run(torch.bfloat16, 32, 49, (2 * y // 7) * (2 * x // 7), topk=4),
    "neighborhood_attention": lambda run, y, x: run(torch.bfloat16, 32, (y, x), 7),
    "neighborhood_attention, table": lambda run, y, x: run(torch.bfloat16, 32, (y, x), 7, rpb=True),
    "group_attention": lambda run, y, x: run(torch.bfloat16, 64, y * x),
    "linear_attention": lambda run, y, x: run(torch.bfloat16, 64, True, False, y * x),
    "linear_scan": lambda run, y, x: run(torch.bfloat16, 3, 64, y * x),
    "channel_attention": lambda run, y, x: run(torch.bfloat16, 32, False, y * x),
    "focal_modulation": lambda run, y, _: run(torch.bfloat16, y, 96, (3, 5)),
}


@pytest.mark.parametrize("name", RUNS)
def test_twenty_image_sizes_need_four_compiled_forms_of_a_kernel_at_most(name: str) -> None:
    run = backend(name.partition(",")[0])._aot_run
    forms = defaultdict(set)
    for rows, columns in SIDES:
        with record("sm_90") as recorded:
            RUNS[name](run, rows, columns)
        for position, launch in enumerate(recorded):  # what a kernel is started for, levels or directions, is no size
            forms[position, launch.kernel.__name__].add(aot.variant(launch, "sm_90"))
    assert all(len(found) <= 4 for found in forms.values()), {kernel: len(found) for kernel, found in forms.items()}


# Operations that start nothing on a GPU: they allocate, or look at memory in another way.
SILENT = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute"),
    *("select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
}


class Started(TorchDispatchMode):
    """Names of torch's operations that start something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        self.names += [] if name in SILENT else [name]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("operator", "run", "most"),
    [
        ("attention", lambda run: run(torch.bfloat16, 64, 2048, 2048), 0),
        ("group_attention", lambda run: run(torch.bfloat16, 128, causal="upper_left"), 6),
        ("group_attention", lambda run: run(torch.bfloat16, 64, mode="gate"), 6),
        ("block_attention", lambda run: run(torch.bfloat16, 32, 49, 16, topk=4), 3 + 4),
    ],
)
def test_a_call_and_its_backward_pass_start_few_operations_of_torch(operator: str, run: Any, most: int) -> None:
    with record("sm_90"), Started() as started:
        run(backend(operator)._aot_run)
    assert len(started.names) <= most, started.names


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ((128, 0, 1000), None),
        ((128, 8, 1000), "spills: 8 bytes of stack"),
        ((256, 0, 1000), "256 registers"),
        ((128, 0, 200_000), "200000 bytes of shared memory, the limit is 166912"),
    ],
)
def test_gate_names_what_is_exceeded(resources: tuple[int, int, int], message: str | None) -> None:
    assert aot._failure("sm_80", *resources) == message


def test_a_bound_that_is_lost_fails_the_same_kernel_of_the_same_case() -> None:
    loop = Loop(flops=2**21, tensor=512.0, issue=688.0, special=544.0, teraflops=700.0)
    report = aot.Report("linear", "wide", "forward", "sm_90", "64 w4 s1", 96, 0, 1024, 8, 128, 4, loop, 1.0, None)
    kept = aot.row(report)
    assert kept["tflops"] == 700
    assert kept["limiter"] == "issue"
    assert aot.lost(report, [kept]) is None
    assert aot.lost(report, [{**kept, "tflops": 720}, {**kept, "tflops": 705}]) is None  # started twice: the least
    assert aot.lost(report, [{**kept, "tflops": 720}]) == "bound of 700 TFLOP/s, it was 720"
    assert aot.lost(replace(report, loop=None), [kept]) == "bound of 0 TFLOP/s, it was 700"
    for other in ("case", "kernel", "architecture"):
        assert aot.lost(report, [{**kept, "tflops": 720, other: "another"}]) is None


@pytest.mark.parametrize(
    ("layout", "result", "copies"),
    [
        ("versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]", "64x64", 2),
        ("versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 32, 16]", "64x64", 1),
        ("versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]", "128x64", 1),
        ("versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 8], instrShape = [16, 8]", "64x32", 2),
        ("versionMajor = 2, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 8]", "32x32", 4),
    ],
)
def test_gate_names_a_product_that_several_warps_compute_alike(layout: str, result: str, copies: int) -> None:
    dot = "tt.dot %a, %b, %c : tensor<64x32xbf16, #x> * tensor<32x64xbf16, #y>"
    found = aot._repeated(f"#mma = #ttg.nvidia_mma<{{{layout}}}>\n  %d = {dot} -> tensor<{result}xf32, #mma> loc(#l)")
    assert (found is None) if copies == 1 else (found is not None and f"computed {copies} times" in found)


@pytest.mark.slow
def test_gate_refuses_a_tile_that_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend("attention"), "choose_tile", lambda *_: Tile(128, 128, 4, 2))
    report = aot.compile_launch("attention", 1, 0, "sm_90", quick=True)
    assert report.kernel == "forward"
    assert report.failure is not None
    assert "stack" in report.failure


@pytest.mark.slow
def test_quick_gate_passes_on_a_hopper_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    # Two small operators; the step ``kernels`` of .ci/run compiles all of them.
    code = aot.main(["--quick", "--arch", "sm_90", "--jobs", "1", "--op", "merge_attention", "channel_attention"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "0 failed" in printed
