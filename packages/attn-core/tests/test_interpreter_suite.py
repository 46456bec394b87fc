"""The interpreter suite in the ordinary run, one process for each file."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "interpreter"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreting process")
@pytest.mark.parametrize("file", sorted(path.name for path in SUITE.glob("test_*.py")))
def test_kernels_pass_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", str(SUITE / file), "-n", "0", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
