"""Settings of every test run in the workspace: two threads, or one for each of several workers; a fixed seed."""

import gc
import os

import pytest
import torch

gc.disable()  # until all is imported and collected
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if PARALLEL else 2)
torch.set_warn_always(True)  # else a warning fails the first test of a process that meets it, whichever that is
if not torch.cuda.is_available():  # or each torch.manual_seed formats the whole stack of its caller, for a GPU to come
    torch.cuda.manual_seed_all = lambda seed: None  # noqa: ARG005  torch's signature
if PARALLEL:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


# What a plain `uv run pytest` leaves to `.ci/run`: every case of what the others try on one, and tests that need
# dependency groups which are not installed.
ASKED_FOR = ("slow", "parity", "browser")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests, those beside peers and in a browser unless ``-m`` speaks of them or a node id names one."""
    wanted = str(config.getoption("markexpr") or "")
    named = any("::" in argument for argument in config.args)
    left_out = [marker for marker in ASKED_FOR if marker not in wanted and not named]
    kept = [item for item in items if not any(item.get_closest_marker(marker) for marker in left_out)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def pytest_collection_finish() -> None:
    """What is imported and collected lives to the end: no search for garbage walks through its million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)
    gc.enable()


def pytest_sessionfinish() -> None:
    """Extension modules look for leaks as Python ends, and find what is frozen."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled(request: pytest.FixtureRequest) -> None:
    """Forget what earlier tests compiled: one function in many models reaches torch's limit of recompilations."""
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()
