"""The benchmark program: small sizes of every operator, judged like the large ones."""

import importlib.util
import json
import pkgutil
from pathlib import Path

import pytest
import torch

from attn_core import ops
from attn_core.bench import __main__ as program
from attn_core.bench.measure import measure, wrong
from attn_core.bench.regression import regressions
from attn_core.testing import TOLERANCE

ENVIRONMENT = {"torch", "triton", "driver", "gpu", "cpu", "commit", "dirty", "date", "threads"}
COLUMNS = {"op", "case", "dtype", "pass", "provider", "ms", "p20", "p80", "mem_mb", "tflops", "gbs", "err_vs_f64"}


def test_every_operator_has_a_benchmark() -> None:
    assert program.operators() == sorted(module.name for module in pkgutil.iter_modules(ops.__path__))


@pytest.mark.parametrize("operator", program.operators())
def test_a_quick_run_writes_rows_within_tolerance_and_a_picture(operator: str, tmp_path: Path) -> None:
    results, picture = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ["--op", operator, "--device", "cpu", "--quick", "--json", str(results), "--plot", str(picture)]
    arguments += ["--threads", "1"]  # two of them wait for each other where other tests run
    assert program.main(arguments) == 0
    written = json.loads(results.read_text(encoding="utf-8"))
    assert set(written["env"]) >= ENVIRONMENT
    measured = [row for row in written["rows"] if row["ms"] is not None]
    for row in written["rows"]:
        assert set(row) >= COLUMNS
        assert row["ms"] is not None or row["note"], row
    for row in measured:
        bound = TOLERANCE[torch.float32] * (1 if row["pass"] == "forward" else 2)
        assert row["err_vs_f64"] <= bound, row  # peers too, or they would compute something else
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["mem_mb"] > 0
    for case in {row["case"] for row in written["rows"]}:
        providers = {row["provider"] for row in measured if row["case"] == case}
        assert "torch" in providers
        assert len(providers) > 1, f"{case}: no peer ran"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_of_ours_fails_the_run() -> None:
    case = next(case for case in program.cases_of("linear", "cpu", True) if case.length)
    rows = measure("linear", case, torch.float32, "cpu", quick=True, seconds=0.01, threads=1)
    row = next(row for row in rows if row["provider"] == "torch")
    assert not wrong(row)
    assert wrong({**row, "err_vs_f64": 1e-3})
    assert wrong({**row, "err_vs_f64": float("nan")})


def test_list_names_cases_and_missing_providers(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--op", "attention", "--device", "cpu", "--quick", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "plain, 64 tokens" in printed
    assert "missing: " in printed  # the Triton kernels, on a CPU


def test_an_unknown_case_is_a_usage_error_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--op", "attention", "--device", "cpu", "--quick", "--case", "plain, 65 token"])
    assert "did you mean 'plain, 64 tokens'?" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="2"):
        program.main(["--op", "linear", "--device", "cpu", "--quick", "--plot", "x.png"])
    assert "pip install 'attn-core[bench]'" in capsys.readouterr().err


def _row(provider: str, ms: float, spread: float = 0.02) -> dict[str, object]:
    place = {"op": "linear", "case": "a", "dtype": "float32", "pass": "forward"}
    return {**place, "provider": provider, "ms": ms, "p20": ms * (1 - spread), "p80": ms * (1 + spread)}


def test_a_grown_ratio_to_the_same_peer_is_a_regression_on_any_machine() -> None:
    base = [_row("torch", 1.0), _row("sdpa", 2.0)]
    slow_machine = [_row("torch", 10.0), _row("sdpa", 20.0)]
    assert regressions(slow_machine, base) == []
    slower = [_row("torch", 13.0), _row("sdpa", 20.0)]
    assert regressions(slower, base) == ["a, float32, forward, torch: 0.65 × sdpa, was 0.50"]
    assert regressions([_row("torch", 13.0, spread=0.3), _row("sdpa", 20.0)], base) == []  # within the noise
    assert regressions(slower, [_row("torch", 1.0)]) == []  # nothing to compare with


def test_a_base_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit):
        program.main(["--op", "linear", "--quick", "--base", str(tmp_path / "base.json")])
    assert "base.json holds no results" in capsys.readouterr().err
