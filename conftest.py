"""Settings of every test run in the workspace: two threads, or one for each of several workers; a fixed seed."""

import os

import pytest
import torch

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if PARALLEL else 2)
if PARALLEL:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled(request: pytest.FixtureRequest) -> None:
    """Forget what earlier tests compiled: one function in many models reaches torch's limit of recompilations."""
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()
