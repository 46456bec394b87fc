"""``tools/gpu.py`` on the interpreter, a few shapes: it must not go stale between two loans of a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/gpu.py"), "--out", str(out), *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False, timeout=500)


def rows(out: Path, step: str) -> list[dict[str, Any]]:
    return json.loads((out / f"{step}.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_step_writes_what_it_found(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", "--most", "3", "--processes", "1", "--models", "davit_tiny",
               "--only", "smoke", "bits", "speed", "counters")  # fmt: skip
    assert done.returncode == 0, done.stderr
    judged = rows(tmp_path, "smoke")
    # bfloat16 products are garbage in the interpreter, so that dtype may be judged wrong here
    assert [row["dtype"] for row in judged] == ["bfloat16", "float16", "float32"]
    assert judged[2]["ok"], judged
    assert judged[2]["error"] <= judged[2]["bound"]
    assert all(row["equal"] in (True, False) for row in rows(tmp_path, "bits"))
    ceilings, *timed = rows(tmp_path, "speed")
    assert ceilings["ceilings"]["gbs"] > 0
    assert any(row["provider"] == "torch" and row["share_of_roofline"] > 0 and row["host_us"] > 0 for row in timed)
    assert "models: not run" in done.stdout


def test_without_a_gpu_it_says_how_to_try(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tools/gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 2
    assert "torch sees no GPU; TRITON_INTERPRET=1 … --device cpu tries the script" in done.stderr
