"""Schedules: short runs work, and a schedule that was changed on resuming is that of an uninterrupted run."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_task import PACKAGE

from attn_core.engine import LinearLR, MultiStepLR, PolyLR, warmup, warmup_cosine
from attn_core.engine.resuming import restore_optimizer, restore_schedules
from attn_core.engine.schedules import fit
from attn_core.engine.train import TrainOptions, train


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _rates(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["lr"] for line in lines if line["split"] == "train"]


def _recipe(tmp_path, schedule: str, loop: str):
    """The tiny recipe with another schedule and loop."""
    from tiny_task.configs import points

    text = Path(points.__file__).read_text()
    text = (
        text[: text.index("param_scheduler")]
        + schedule
        + f"\ntrain_cfg = dict({loop})\n"
        + "\n".join(line for line in text.splitlines() if line.startswith(("default_hooks", "custom_hooks")))
    )
    path = tmp_path / "short.py"
    path.write_text(text.replace("every_steps=3", "every_steps=1"))
    return str(path)


EPOCHS = """
from attn_core.engine import warmup_cosine
warm = 5
param_scheduler = warmup_cosine(epochs, warm, start_factor=0.1)
"""
STEPS = """
from attn_core.engine import warmup_cosine
steps = 600
param_scheduler = warmup_cosine(steps, 100, start_factor=0.1, in_steps=True)
"""
MIXED = """
from attn_core.engine import LinearLR, MultiStepLR
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type=MultiStepLR, by_epoch=True, milestones=[11], gamma=0.1),
]
"""


IN_STEPS = "by_epoch=False, max_iters=steps, val_interval=50"


@pytest.mark.parametrize(
    ("schedule", "loop", "setting", "note"),
    [
        (EPOCHS, "max_epochs=epochs", "epochs=1", "warm-up of 5 epochs cut to 0: the run has 1"),
        (EPOCHS, "max_epochs=epochs", "epochs=2", "warm-up of 5 epochs cut to 0.333: the run has 2"),
        (EPOCHS, "max_epochs=epochs", "epochs=5", "warm-up of 5 epochs cut to 1: the run has 5"),
        (STEPS, IN_STEPS, "steps=30", "warm-up of 100 steps cut to 6: the run has 30"),
        (STEPS, IN_STEPS, "steps=1", "warm-up of 100 steps cut to 0: the run has 1"),
        (MIXED, "max_epochs=epochs", "epochs=1", "warm-up of 1000 steps cut to 0: the run has 6"),
    ],
)  # fmt: skip
def test_a_run_shorter_than_its_warmup_works_and_says_so(tmp_path, caplog, schedule, loop, setting, note):
    recipe = _recipe(tmp_path, schedule, loop)
    train(PACKAGE, TrainOptions(recipe=recipe, overrides=[setting], out=tmp_path / "run"), say=lambda _: None)
    assert note in caplog.messages
    rates = _rates(tmp_path / "run")
    assert max(rates) == pytest.approx(1e-2, rel=0.05)  # the full rate is reached


@pytest.mark.parametrize("epochs", [6, 7, 50])
def test_a_warmup_that_fits_stays(epochs):
    schedules = warmup_cosine(epochs, 5)
    assert fit(schedules, epochs=epochs, steps=epochs * 9) == (schedules, "")


def test_every_short_schedule_can_be_built():
    """Products of batches, epochs, warm-ups, units and followers: begins before ends, warm-ups inside the run."""
    for case in product([1, 2, 7, 400], [1, 2, 3, 11], [1, 2, 5, 20], [False, True], ["cosine", "poly", "none"]):
        batches, epochs, warm, in_steps, follower = case
        steps = batches * epochs
        length = steps if in_steps else epochs
        schedules = warmup_cosine(length, warm, in_steps=in_steps)
        if follower == "poly":
            schedules[1]["type"] = PolyLR
            del schedules[1]["T_max"]
        if follower == "none":
            schedules = [warmup(warm, in_steps=in_steps)]
        fitted, line = fit(schedules, epochs=epochs, steps=steps)
        assert bool(line) == (fitted != schedules), case
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        for entry in fitted:
            options = dict(entry)
            kind, convert = options.pop("type"), options.pop("convert_to_iter_based", False)
            build = kind.build_iter_from_epoch if convert else kind
            schedule = build(optimizer=optimizer, **options, **({"epoch_length": batches} if convert else {}))
            assert 0 <= schedule.begin < schedule.end <= max(steps, length), case


# ---- resuming


def test_a_run_that_is_resumed_for_longer_has_the_learning_rates_of_the_longer_run(tmp_path, caplog):
    recipe = _recipe(tmp_path, EPOCHS.replace("5", "1"), "max_epochs=epochs")
    options = {"recipe": recipe, "say": None}
    for out, epochs in (("short", 2), ("long", 5)):
        train(PACKAGE, TrainOptions(recipe=options["recipe"], overrides=[f"epochs={epochs}"], out=tmp_path / out),
              say=lambda _: None)  # fmt: skip
    train(PACKAGE, TrainOptions(resume=True, overrides=["epochs=5"], out=tmp_path / "short"), say=lambda _: None)
    assert "the learning rate goes on as if the run had begun with the changed settings" in caplog.messages
    assert _rates(tmp_path / "short")[12:] == pytest.approx(_rates(tmp_path / "long")[12:])
    assert len(_rates(tmp_path / "short")) == len(_rates(tmp_path / "long"))


@pytest.mark.parametrize("setting", ["optim_wrapper.optimizer.lr=2e-3", "optim_wrapper.optimizer.weight_decay=0.5"])
def test_a_setting_of_the_optimizer_can_be_changed_on_resuming(tmp_path, setting):
    train(PACKAGE, TrainOptions(overrides=["epochs=1"], out=tmp_path / "run"), say=lambda _: None)
    train(PACKAGE, TrainOptions(overrides=["epochs=2", setting], out=tmp_path / "run", resume=True),
          say=lambda _: None)  # fmt: skip
    state = torch.load(tmp_path / "run/step_12.state.pt", weights_only=True)["optimizer"]["param_groups"][0]
    name, value = setting.removeprefix("optim_wrapper.optimizer.").split("=")
    assert state["initial_lr" if name == "lr" else name] == float(value)


def _built(length, gamma=0.5):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    schedules = [
        LinearLR(optimizer, start_factor=0.1, begin=0, end=3, by_epoch=False),
        MultiStepLR(optimizer, milestones=[length], gamma=gamma, by_epoch=True),
    ]
    return optimizer, schedules


def test_replaying_gives_the_values_of_the_uninterrupted_schedule():
    """A chain of one schedule in steps and one in epochs, at every step of three epochs of four batches."""
    expected = []
    optimizer, schedules = _built(2)
    for step in range(1, 13):
        optimizer.step()
        schedules[0].step()
        if step % 4 == 0:
            schedules[1].step()
        expected.append(optimizer.param_groups[0]["lr"])
    for step in range(1, 13):
        old, before = _built(1, gamma=0.1)
        states = [dict(schedule.state_dict()) for schedule in before]
        optimizer, schedules = _built(2)
        assert restore_schedules(schedules, states, step, 4, changed=False)
        assert optimizer.param_groups[0]["lr"] == expected[step - 1]
        del old


def test_an_optimizer_of_another_kind_is_refused():
    from attn_core.engine import ConfigError
    from attn_core.engine.optim import OptimWrapper

    net = torch.nn.Linear(2, 2)
    state = OptimWrapper(torch.optim.AdamW(net.parameters())).state_dict()
    with pytest.raises(ConfigError, match="the checkpoint is of an optimizer of another kind"):
        restore_optimizer(OptimWrapper(torch.optim.SGD(net.parameters(), lr=0.1)), state)
