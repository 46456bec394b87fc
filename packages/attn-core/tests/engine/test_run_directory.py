"""Run directories: locked while in use, clean after a failed start, and never mistaken for another run."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
from tiny_task import PACKAGE, Points

from attn_core.engine import EngineError, PackageId
from attn_core.engine.run import evaluate, open_run
from attn_core.engine.run_directory import about_run, claim
from attn_core.engine.train import TrainOptions, train

OTHER = PackageId(name="other-tasks", module="tiny_task", default_recipe="points")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _train(*settings, package=PACKAGE, **options):
    return train(package, TrainOptions(overrides=settings, **options), say=lambda _: None)


def _hold(directory, held, release):
    with claim(directory):
        held.set()
        release.wait(60)


def test_a_directory_in_use_is_refused_and_free_again_when_its_process_is_killed(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "run", held, release))
    holder.start()
    assert held.wait(60)
    with pytest.raises(EngineError, match=rf"run is in use by process {holder.pid} on \S+; wait, or choose another"):
        _train(out=tmp_path / "run", resume=True)
    assert (tmp_path / "run/result.json").exists()
    holder.kill()
    holder.join()
    assert (tmp_path / "run/.lock").exists()
    with claim(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run/.lock").read_text()
    assert not (tmp_path / "run/.lock").exists()


class _Broken(Points):
    def __init__(self, split, **options):
        if split == "test":
            raise FileNotFoundError(2, "No such file or directory", "data/test")
        super().__init__(split, **options)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (("train_dataloader.dataset.size=1",), {}),
        (("test_dataloader.dataset.type=test_run_directory._Broken",), {"tensorboard": True}),
        (("activation_checkpointing=['nothing']",), {}),
        (("optim_wrapper.optimizer.lr=-1",), {}),
        (("train_dataloader.dataset.bad=0", "train_dataloader.batch_size=48"), {}),
    ],
    ids=["train data", "test data", "module", "optimizer", "nan"],
)
def test_a_failed_start_leaves_nothing_behind(tmp_path, settings, options, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_run_directory", sys.modules[__name__])
    with pytest.raises((EngineError, ValueError, OSError)):
        _train(*settings, **options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises((EngineError, ValueError, OSError)):
        _train(*settings, out=tmp_path / "there", **options)
    assert list((tmp_path / "there").iterdir()) == []


def test_resume_without_a_run_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(EngineError, match=r"no run of points under runs/ to resume; leave --resume out to start one"):
        _train(resume=True)
    _train("epochs=1")
    with pytest.raises(EngineError, match=r"runs/pints holds no run to resume; did you mean 'runs/points'\?"):
        _train(resume=True, out=Path("runs/pints"))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["points"]


@pytest.mark.parametrize(
    "use", [open_run, evaluate, lambda package, run: _train(package=package, out=run, resume=True)]
)
def test_a_run_of_another_package_is_named_as_such(tmp_path, use):
    _train("epochs=1", out=tmp_path / "run")
    with pytest.raises(EngineError, match="run is a run of tiny, not of other-tasks; use the command tiny"):
        use(OTHER, tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", '{"package": 3, "commands": "x", "data_info": []}', ""])
def test_a_damaged_run_json_does_no_harm(tmp_path, text):
    _train("epochs=1", out=tmp_path / "run")
    (tmp_path / "run/run.json").write_text(text)
    assert about_run(tmp_path / "run") == {}
    assert open_run(PACKAGE, tmp_path / "run").data_info == {"classes": ["left", "right"]}  # a checkpoint says it too
    _train("epochs=2", out=tmp_path / "run", resume=True)
    assert about_run(tmp_path / "run")["package"] == "tiny"


def test_variables_stay_in_the_run(tmp_path):
    _train("epochs=1", "size=40", "custom_hooks.0.momentum=0.3", out=tmp_path / "run", seed=3)
    _train("epochs=3", out=tmp_path / "run", resume=True)
    run = open_run(PACKAGE, tmp_path / "run")
    assert run.config["variables"] == {"epochs": 3, "size": 40}
    assert run.config["train_cfg"]["max_epochs"] == 3
    assert run.config["param_scheduler"][1]["end"] == 3
    assert run.config["custom_hooks"][0]["momentum"] == 0.3
    assert run.config["randomness"]["seed"] == 3
    assert run.config["train_dataloader"]["dataset"]["size"] == 40


def test_a_variable_cannot_be_changed_without_the_copy_of_the_recipe(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    (tmp_path / "run/recipe.py").unlink()
    with pytest.raises(
        EngineError, match=r"--set epochs: \S+recipe.py is missing; set what depends on it by its dotted"
    ):
        _train("epochs=3", out=tmp_path / "run", resume=True)


def test_eval_takes_the_split_that_exists(tmp_path):
    recipe = tmp_path / "without_test.py"
    from tiny_task.configs import points

    text = Path(points.__file__).read_text()
    recipe.write_text("\n".join(line for line in text.splitlines() if not line.startswith("test_dataloader")))
    result = _train("epochs=1", recipe=str(recipe), out=tmp_path / "run")
    assert result.metrics == {}
    split, metrics = evaluate(PACKAGE, tmp_path / "run")
    assert (split, list(metrics)) == ("val", ["accuracy"])
    with pytest.raises(EngineError, match="run has no test split; use --split val"):
        evaluate(PACKAGE, tmp_path / "run", split="test")


def test_the_batch_is_told_over_all_processes_and_accumulated_steps(command):
    assert "samples; batch 8\n" in command("train", "--set", "epochs=1")[1]
    code, text = command("train", "--set", "epochs=1", "--set", "optim_wrapper.accumulative_counts=3", processes=2)
    assert code == 0, text
    assert "samples; batch 24 (2 processes × 4 × 3 accumulated)\n" in text


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path):
    """Two batches of 24 and one of 48 make the same update, to rounding."""
    same = ("model.net.dropout=0.0", "custom_hooks=[]", "train_dataloader.dataset.noise=0.0", "epochs=1",
            "optim_wrapper.clip_grad=none", "param_scheduler=[]")  # fmt: skip
    _train(*same, "train_dataloader.batch_size=24", "optim_wrapper.accumulative_counts=2", out=tmp_path / "two")
    _train(*same, "train_dataloader.batch_size=48", out=tmp_path / "one")
    _train(*same, "train_dataloader.batch_size=24", out=tmp_path / "plain")
    found = {
        run: open_run(PACKAGE, tmp_path / run).model.get_parameter("net.last.weight").detach()
        for run in ("one", "two", "plain")
    }
    assert float((found["one"] - found["two"]).abs().max()) < 1e-5
    assert float((found["one"] - found["plain"]).abs().max()) > 1e-4


def test_commands_of_a_run_are_kept(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    before = time.time()
    _train("epochs=2", out=tmp_path / "run", resume=True)
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert len(about["commands"]) == 2
    assert about["started"] <= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before + 1)) + "+00:00"
