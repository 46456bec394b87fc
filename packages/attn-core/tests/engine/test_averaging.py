"""The moving average: its weights, its warm-up, its begin."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import PACKAGE

from attn_core.engine import ConfigError, EMAHook
from attn_core.engine.train import TrainOptions, train


class _Runner:
    """As much of a runner as the hook asks for."""

    def __init__(self) -> None:
        self.bare_model = torch.nn.Linear(1, 1, bias=False)
        self.bare_model.weight.data.fill_(0.0)
        self.iter = 0


def _share_of_the_start(hook: EMAHook, steps: int) -> float:
    """How much of the average is the initialization when every later parameter is 1."""
    runner = _Runner()
    hook.before_train(runner)
    runner.bare_model.weight.data.fill_(1.0)
    for runner.iter in range(steps):
        hook.after_train_iter(runner, 0)
    hook.before_val_epoch(runner)
    return 1 - runner.bare_model.weight.item()


def test_a_long_average_forgets_the_initialization_in_a_short_run():
    assert _share_of_the_start(EMAHook(4e-5), 1800) < 1e-6
    assert _share_of_the_start(EMAHook(4e-5, warmup=False), 1800) == pytest.approx((1 - 4e-5) ** 1800, rel=1e-3)  # 93 %


def test_the_warmup_is_that_of_timm():
    utils = pytest.importorskip("timm.utils")
    theirs = utils.ModelEmaV3(torch.nn.Linear(1, 1), decay=0.995, use_warmup=True, update_after_step=3)
    ours = EMAHook(0.005, begin_step=3)
    for step in range(1, 400):
        assert 1 - ours.weight(step) == pytest.approx(theirs.get_decay(step - 0), abs=1e-9), step


def test_before_its_first_step_the_average_follows_the_parameters():
    hook, runner = EMAHook(0.5, begin_step=3, warmup=False), _Runner()
    hook.before_train(runner)
    seen = []
    for runner.iter, value in enumerate((1.0, 2.0, 3.0, 5.0)):
        runner.bare_model.weight.data.fill_(value)
        hook.after_train_iter(runner, 0)
        hook.before_val_epoch(runner)
        seen.append(runner.bare_model.weight.item())
        hook.after_val_epoch(runner)
        assert runner.bare_model.weight.item() == value
    assert seen == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"momentum": 0.0}, "momentum must be between 0 and 1, got 0.0"),
    ({"momentum": 1.0}, "momentum must be between 0 and 1, got 1.0"),
    ({"begin_step": -1}, "begin_step must not be negative, got -1"),
])  # fmt: skip
def test_a_wrong_setting_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EMAHook(**arguments)


@pytest.mark.parametrize("best", ["accuracy", None])
def test_the_pictures_are_drawn_with_the_weights_that_the_result_tests(tmp_path, best):
    """With and without a choice of the best: the model drawn is the file named in result.json."""
    drawn = {}

    def draw(model, loader, _path):
        drawn.update({name: value.clone() for name, value in model.state_dict().items()})
        correct = [int(r["scores"].argmax()) == r["label"] for batch in loader for r in model.predict(**batch)]
        drawn["accuracy"] = sum(correct) / len(correct)

    settings = (f"default_hooks.checkpoint.best={best}", "custom_hooks.0.momentum=0.02", "custom_hooks.0.warmup=false")
    result = train(PACKAGE, TrainOptions(overrides=settings, out=tmp_path / "run"), say=lambda _: None, draw=draw)
    written = json.loads((tmp_path / "run/result.json").read_text())
    assert written["test"]["accuracy"] == result.metrics["accuracy"] == drawn.pop("accuracy")
    saved = load_file(tmp_path / f"run/{written['checkpoint']}.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in drawn.items())
