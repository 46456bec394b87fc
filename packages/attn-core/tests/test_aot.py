"""The ahead-of-time gate: what it refuses, that its cases reach every shipped tile, and that a subset passes."""

import importlib
import importlib.util
from typing import Any

import pytest

from attn_core import aot
from attn_core.kernels.launch import Launch, Tile, record

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
        (key if isinstance(key, str) else key[0], tile)
        for key, by_width in module.TILES_FLOAT32.items()
        for tile in by_width.values()
    ]
    for kernel, tile in shipped:
        assert (f"{kernel}_kernel", tile.rows, tile.columns, tile.warps, tile.stages) in reached, (kernel, tile)


def test_recording_starts_nothing_and_ends_with_its_block() -> None:
    assert launches("attention", "sm_90")
    from attn_core.kernels import launch

    assert launch._recorder is None


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
