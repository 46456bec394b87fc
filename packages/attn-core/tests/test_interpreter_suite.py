"""The interpreter suite in the ordinary run: a process for several files, since each begins with many imports."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(str(path) for path in (Path(__file__).parent / "interpreter").glob("test_*.py"))
PROCESSES = 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process")
@pytest.mark.parametrize("part", range(PROCESSES))
def test_kernels_pass_in_the_interpreter(part: int) -> None:
    command = [sys.executable, "-m", "pytest", *FILES[part::PROCESSES], "-n", "0", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
