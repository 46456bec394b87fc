"""Methods over seeds: what the summary counts, and that measured models are not measured again."""

import json
from pathlib import Path

import pytest

from vlm_tools.bench.methods_over_seeds import main, summary


def rows(*changes: float) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for seed, change in enumerate(changes):
        found += [
            {"seed": seed, "threads": 1, "method": "baseline", "chair_s": 0.25},
            {"seed": seed, "threads": 1, "method": "VCD 1", "chair_s": 0.25 + change},
            {"seed": seed, "threads": 1, "method": "VAR", "note": "too narrow"},
        ]
    return found


def test_summary_counts_directions_and_leaves_out_what_could_not_work() -> None:
    lines = list(summary(rows(-0.125, 0.0, 0.0625)))
    assert lines[0] == "3 models (threads, seed): (1, 0), (1, 1), (1, 2)"
    assert lines[-1] == "VCD 1: lower in 1, higher in 1 of 3; change -0.125 … +0.062, mean -0.021"
    assert not any("VAR" in line for line in lines)


def test_measured_models_are_read_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows(-0.125)))
    arguments = ["--seeds", "2", "--threads", "1", "--runs", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    main([*arguments, "--finished"])
    assert "VCD 1: lower in 1, higher in 0 of 1" in capsys.readouterr().out
