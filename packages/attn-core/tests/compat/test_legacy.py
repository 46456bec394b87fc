"""Repairs of what libraries removed: named, complete, taken back."""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_core.compat import REPAIRS, legacy


def test_everything_is_taken_back() -> None:
    before = list(sys.path), list(sys.meta_path), torch.cuda.device, torch.Tensor.cuda
    with legacy(*(name for name in REPAIRS if name not in ("torchvision", "transformers"))):
        assert float is float  # pyright: ignore[reportAttributeAccessIssue]
        importlib.import_module("pkg_resources")
        assert importlib.import_module("torch._six").string_classes == (str, bytes)
    assert (list(sys.path), list(sys.meta_path), torch.cuda.device, torch.Tensor.cuda) == before
    assert not hasattr(np, "float")
    assert "torch._six" not in sys.modules
    assert not hasattr(torch, "_six")


def test_names_that_numpy_has_keep_their_meaning() -> None:
    kept = np.bool
    with legacy("numpy"):
        assert np.bool is kept
        assert int is int  # pyright: ignore[reportAttributeAccessIssue]


def test_pkg_resources_knows_what_is_installed_and_says_what_is_not() -> None:
    with legacy("pkg_resources"):
        resources = importlib.import_module("pkg_resources")
        assert torch.__version__.startswith(resources.get_distribution("torch>=1.3").version)
        assert resources.parse_version("1.10") > resources.parse_version("1.9")
        with pytest.raises(resources.DistributionNotFound, match="swattention"):
            resources.get_distribution("swattention")
        with pytest.raises(AttributeError, match=r"pkg_resources\.WorkingSet is not provided"):
            _ = resources.WorkingSet


def test_torch_cuda_device_of_a_cpu_does_nothing() -> None:
    with legacy("torch.cuda.device"):
        for cpu in ("cpu", torch.device("cpu")):
            with torch.cuda.device(cpu):
                pass


def test_cuda_calls_stay_on_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with legacy("cuda()"):
        assert torch.ones(1).cuda().device.type == "cpu"
        assert torch.nn.Linear(1, 1).cuda(0).weight.device.type == "cpu"


def test_a_module_imported_later_is_repaired_when_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "torchvision/ops"
    folder.mkdir(parents=True)
    for file in (tmp_path / "torchvision/__init__.py", folder / "__init__.py", folder / "misc.py"):
        file.write_text("own = 1\n", encoding="utf-8")
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchvision"}
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with legacy("torchvision"):
            misc = importlib.import_module("torchvision.ops.misc")
            x = torch.ones(2, 3, 4, 6)
            assert misc._NewEmptyTensorOp.apply(x, (0, 3)).shape == (0, 3)
            assert misc._output_size(2, x, None, 0.5) == [2, 3]
            assert misc._output_size(2, x, (5, 7), None) == [5, 7]
            assert importlib.import_module("torchvision.ops")._new_empty_tensor(x, (1,)).shape == (1,)
            assert isinstance(misc, types.ModuleType)
            assert misc.own == 1
        assert not hasattr(misc, "_output_size")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(hidden)


def test_unknown_repairs_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"legacy: there is no repair 'np.float'; choose from"):
        legacy("np.float")
    with pytest.raises(ValueError, match="legacy: name at least one repair"):
        legacy()
