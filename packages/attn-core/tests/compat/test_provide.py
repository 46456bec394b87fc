"""Putting shims in place: nothing installed is hidden, everything is found by all means of finding, nothing stays."""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import attn_core
import attn_core.compat.__main__ as command
from attn_core.compat import SHIMS, InstalledError, provide
from attn_core.compat.startup.attn_core_shims import SITE

Package = Callable[..., Path]
WHOLE = "swattention"  # a shim of one whole package that nobody has installed


def state() -> tuple[list[str], list[object], dict[str, str | None]]:
    return list(sys.path), list(sys.meta_path), {v: os.environ.get(v) for v in ("ATTN_CORE_COMPAT", "PYTHONPATH")}


@pytest.mark.parametrize("name", sorted(SHIMS))
def test_every_name_leads_to_folders_and_files_that_are_there(name: str) -> None:
    shim = SHIMS[name]
    assert shim.packages() or shim.foreign
    assert all((SITE / file).is_file() for file in shim.foreign.values())
    if shim.folder is not None:
        assert list((SITE / shim.folder).glob("*.dist-info/METADATA"))


def test_leaving_restores_path_finders_modules_and_environment() -> None:
    before = state()
    with provide(WHOLE, "msda", "mmcv_ext"):
        module = importlib.import_module(WHOLE)
        assert module.__attn_core_compat__
        assert state() != before
    assert state() == before
    assert WHOLE not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(WHOLE)


def test_find_spec_metadata_and_import_agree() -> None:
    with provide("spatial_correlation_sampler"):
        spec = importlib.util.find_spec("spatial_correlation_sampler")
        module = importlib.import_module("spatial_correlation_sampler")
        assert spec is not None
        assert spec.origin == module.__file__
        assert importlib.metadata.version("spatial_correlation_sampler") == module.__version__ == "0.5.0+attn_core"


def test_an_installed_package_is_refused_and_stays(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    place = package(WHOLE)
    before = state()
    with pytest.raises(InstalledError, match=r"provide: swattention is installed \(.*__init__.py\) .* pass force=True"):
        provide(WHOLE)
    assert state() == before
    assert importlib.import_module(WHOLE).real
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(place.parent)])
    with pytest.raises(InstalledError):  # loaded, and gone from the path
        provide(WHOLE)


def test_force_hides_an_installed_package_with_one_warning_until_the_end(package: Package) -> None:
    package(WHOLE)
    real = importlib.import_module(WHOLE)
    with pytest.warns(UserWarning, match=r"force=True: .* swattention \(.*__init__.py\)") as warned:
        provided = provide(WHOLE, force=True)
    assert len(warned) == 1
    assert importlib.import_module(WHOLE).__attn_core_compat__
    provided.restore()
    assert importlib.import_module(WHOLE) is real


def test_of_a_shim_of_many_packages_the_installed_one_is_used(package: Package) -> None:
    package("causal_conv1d")
    with provide("mamba"):
        assert importlib.import_module("causal_conv1d").real
        assert importlib.import_module("selective_scan_cuda").__attn_core_compat__


def test_a_folder_of_sources_without_init_hides_no_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / WHOLE).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with provide(WHOLE):
        assert importlib.import_module(WHOLE).__attn_core_compat__


def test_what_a_failed_import_left_behind_is_dropped_and_brought_back() -> None:
    left = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("flash_attn.bert_padding", None))
    sys.modules["flash_attn.bert_padding"] = left
    try:
        with provide("flash_attn"):
            module = importlib.import_module("flash_attn.bert_padding")
            assert module is not left
        assert sys.modules["flash_attn.bert_padding"] is left
    finally:
        del sys.modules["flash_attn.bert_padding"]


def test_a_module_of_another_package_is_found_behind_its_own(package: Package) -> None:
    package("groundingdino")
    (package("dfa3D") / "_ext.py").write_text("real = True\n", encoding="utf-8")
    with provide("msda"):
        code = "from groundingdino import _C as c\nfrom dfa3D import _ext as own\n"
        names: dict[str, object] = {}
        exec(code, names)
        assert hasattr(names["c"], "ms_deform_attn_backward")
        assert getattr(names["own"], "real", False)
    assert not hasattr(importlib.import_module("groundingdino"), "_C")
    assert "groundingdino._C" not in sys.modules


def test_a_loaded_module_of_another_package_stays_unless_forced(package: Package) -> None:
    (package("mmcv") / "_ext.py").write_text("real = True\n", encoding="utf-8")
    real = importlib.import_module("mmcv._ext")
    with provide("mmcv_ext"):
        assert importlib.import_module("mmcv._ext") is real
    with provide("mmcv_ext", force=True):
        with pytest.warns(UserWarning, match=r"force=True: .* mmcv\._ext \(.*_ext\.py\)") as warned:
            assert importlib.import_module("mmcv._ext").__attn_core_compat__
        assert len(warned) == 1
    assert importlib.import_module("mmcv._ext") is real
    assert importlib.import_module("mmcv")._ext is real


def test_the_same_shim_twice_stays_until_the_outer_end() -> None:
    with provide(WHOLE):
        outer = importlib.import_module(WHOLE)
        with provide(WHOLE):
            assert importlib.import_module(WHOLE) is outer
        assert importlib.import_module(WHOLE) is outer
    assert WHOLE not in sys.modules


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("natten",), r"provide: there is no shim 'natten'; choose from 'natten@0.14', 'natten@0.15', 'natten@0.17'"),
        (("msdaa",), r"provide: there is no shim 'msdaa'; choose from 'msda'"),
        (("flash_attn", "flash_attn@2.6"), r"provide: flash_attn, flash_attn@2.6 both bring flash_attn; choose one"),
        ((), r"provide: name at least one shim"),
    ],
)
def test_names_that_cannot_be_provided_are_refused_in_one_line(names: tuple[str, ...], message: str) -> None:
    before = state()
    with pytest.raises(ValueError, match=message):
        provide(*names)
    assert state() == before


def test_another_version_beside_the_first_is_refused() -> None:
    with provide("flash_attn"), pytest.raises(ValueError, match=r"provide: flash_attn-2.8 is provided already"):
        provide("flash_attn@2.6")


def test_children_find_the_same_and_a_hidden_sitecustomize_still_runs(tmp_path: Path, package: Package) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SEEN'] = '1'\n", encoding="utf-8")
    package("mmcv")
    code = (
        "import importlib.util, importlib.metadata, os;"
        "print(importlib.util.find_spec('swattention').origin, importlib.metadata.version('swattention'),"
        " importlib.util.find_spec('mmcv._ext').origin, os.environ.get('SEEN'))"
    )
    with provide(WHOLE, "mmcv_ext"):
        path = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    own, version, foreign, seen = done.stdout.split()
    assert own == str(SITE / "swattention/swattention.py")
    assert (version, foreign, seen) == ("1.0+attn_core", str(SITE / "foreign/mmcv_ext.py"), "1")


def test_no_module_of_the_core_imports_compat() -> None:
    root = Path(attn_core.__file__).parent
    for file in root.rglob("*.py"):
        if "compat" in file.relative_to(root).parts:
            continue
        imported = re.search(r"^\s*(from|import)\b.*\bcompat\b", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert imported is None, file


def test_the_command_runs_a_script_and_its_spawned_workers_over_the_shims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import importlib.util, multiprocessing, sys\n"
        "def work(queue):\n"
        "    import numpy\n"
        "    queue.put((importlib.util.find_spec('swattention') is not None, numpy.float is float))\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    worker = context.Process(target=work, args=(queue,))\n"
        "    worker.start()\n"
        "    print(sys.argv[1:], importlib.util.find_spec('swattention') is not None, queue.get(timeout=60))\n"
        "    worker.join()\n",
        encoding="utf-8",
    )
    started: list[subprocess.CompletedProcess[str]] = []

    def execvp(program: str, command: list[str]) -> None:  # what would replace this process
        started.append(subprocess.run(command, capture_output=True, text=True))
        raise SystemExit(started[0].returncode)

    active: list[Any] = []
    monkeypatch.setattr(os, "execvp", execvp)
    for name in ("provide", "legacy"):
        function = getattr(command, name)
        monkeypatch.setattr(command, name, lambda *a, _f=function, **k: active.append(_f(*a, **k)))
    try:
        with pytest.raises(SystemExit):
            command.main(["run", "--provide", WHOLE, "--legacy", "numpy", str(script), "--lr", "1"])
    finally:
        for change in reversed(active):
            change.restore()
    assert started[0].stdout.strip() == "['--lr', '1'] True (True, True)", started[0].stderr


@pytest.mark.slow
def test_children_of_torchrun_find_the_shims(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import importlib.metadata, importlib.util, os, pathlib, sys\n"
        "found = importlib.util.find_spec('swattention') is not None\n"
        "report = f\"{found} {importlib.metadata.version('swattention')}\"\n"
        "(pathlib.Path(sys.argv[0]).parent / os.environ['RANK']).write_text(report)\n",
        encoding="utf-8",
    )
    run = [sys.executable, "-m", "attn_core.compat", "run", "--provide", "swattention", "--"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*run, *launcher], capture_output=True, text=True, timeout=300)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True 1.0+attn_core"] * 2, done.stderr
