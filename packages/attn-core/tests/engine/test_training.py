"""The loop itself: what stops it, what it computes, what it writes."""

import json
import math
from typing import Any

import pytest
import torch
from tiny_task import PACKAGE, Points, draw_predictions

from attn_core.engine import ConfigError, EngineError, NonFiniteLossError
from attn_core.engine.checkpoint import list_checkpoints
from attn_core.engine.optim import GroupedConstructor, OptimWrapper
from attn_core.engine.run import evaluate, open_run
from attn_core.engine.sampling import ResumableBatchSampler, build_dataloader
from attn_core.engine.train import TrainOptions, train


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _train(*settings, **options):
    return train(PACKAGE, TrainOptions(overrides=settings, **options), say=lambda _: None, draw=draw_predictions)


def test_a_nan_sample_stops_the_run_before_the_update_and_is_named(tmp_path):
    with pytest.raises(NonFiniteLossError) as caught:
        _train("train_dataloader.dataset.bad=29", out=tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("train: step ")
    assert "loss is nan on samples [" in message
    assert "29" in message
    assert message.endswith("the update was not made")
    step = int(message.split()[2])
    written = [int(name.removeprefix("step_")) for name in list_checkpoints(tmp_path / "run")]
    assert all(number < step for number in written)


def test_an_infinite_gradient_stops_before_the_update():
    weight = torch.nn.Parameter(torch.ones(3))
    wrapper = OptimWrapper(torch.optim.SGD([weight], lr=0.1), clip_grad={"max_norm": 1.0})
    with pytest.raises(NonFiniteLossError, match="gradient norm is inf"):
        wrapper.update_params((weight * torch.tensor([3e38, -3e38, 0.0])).sum())
    assert torch.equal(weight.detach(), torch.ones(3))


def test_amp_on_the_cpu_computes_in_bfloat16_and_learns(tmp_path):
    weight = torch.nn.Linear(4, 4)
    wrapper = OptimWrapper(torch.optim.SGD(weight.parameters(), lr=0.1), amp=True)
    with wrapper.optim_context(weight):
        assert weight(torch.randn(2, 4)).dtype == torch.bfloat16
    with OptimWrapper(torch.optim.SGD(weight.parameters(), lr=0.1)).optim_context(weight):
        assert weight(torch.randn(2, 4)).dtype == torch.float32
    result = _train(amp=True, out=tmp_path / "run")
    _train(out=tmp_path / "plain")
    assert result.metrics["accuracy"] >= 0.7
    losses = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-2]) for run in ("run", "plain")]
    assert losses[0]["loss"] != losses[1]["loss"]
    assert abs(losses[0]["loss"] - losses[1]["loss"]) < 0.05


def test_parameters_with_equal_settings_share_a_group():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    settings = {"optimizer": {"type": torch.optim.AdamW, "lr": 0.1, "weight_decay": 0.05}, "type": OptimWrapper}
    wrapper = GroupedConstructor(settings, {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0})(net)
    groups = {group["weight_decay"]: len(group["params"]) for group in wrapper.optimizer.param_groups}
    assert groups == {0.05: 2, 0.0: 4}


def test_the_best_weights_are_selected_on_the_validation_split_and_tested_once(tmp_path):
    result = _train(out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    validations = {line["step"]: line["accuracy"] for line in lines if line["split"] == "val"}
    assert len(validations) == 6
    first_best = min(step for step, value in validations.items() if value == max(validations.values()))
    assert list_checkpoints(tmp_path / "run", best=True) == [f"best_step_{first_best}"]
    assert evaluate(PACKAGE, tmp_path / "run") == ("test", result.metrics)
    assert evaluate(PACKAGE, tmp_path / "run", split="val") == ("val", {"accuracy": max(validations.values())})


def test_a_finished_run_can_be_opened(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    run = open_run(PACKAGE, tmp_path / "run")
    assert run.data_info == {"classes": ["left", "right"]}
    assert not run.model.training
    assert run.checkpoint.name == "best_step_6.safetensors"
    assert run.model(image=torch.zeros(3, 4)).shape == (3, 2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        ["best_step_6.json", "best_step_6.safetensors", "config.py", "curves.png", "metrics.jsonl"]
        + ["predictions.png", "recipe.py", "result.json", "run.json", "train.log"]
        + [f"step_{n}.{suffix}" for n in (4, 6) for suffix in ("json", "safetensors", "state.pt")]
    )


def test_the_result_tells_wall_time_and_processor_time(tmp_path):
    result = _train("epochs=1", out=tmp_path / "run")
    written = json.loads((tmp_path / "run/result.json").read_text())
    assert written["seconds"] == round(result.seconds, 2) > 0
    assert written["processor_seconds"] == round(result.processor_seconds, 2) > 0


def test_only_the_newest_checkpoints_stay(tmp_path):
    _train("default_hooks.checkpoint.keep=1", "epochs=2", out=tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == ["step_12"]


def test_tensorboard_gets_the_numbers(tmp_path):
    _train("epochs=1", out=tmp_path / "run", tensorboard=True)
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_a_run_that_fails_before_its_first_result_leaves_its_place_free(tmp_path):
    with pytest.raises(ConfigError):
        _train("optim_wrapper.type=mmengine.optim.OptimWrapper", out=tmp_path / "run")
    with pytest.raises(NonFiniteLossError, match="step 1 "):
        _train("train_dataloader.dataset.bad=0", "train_dataloader.batch_size=48", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_wrapper_without_the_guard_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not stop at a non-finite loss; leave the type out"):
        _train("optim_wrapper.type=mmengine.optim.OptimWrapper", out=tmp_path / "run")


def test_an_existing_run_is_not_overwritten(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    with pytest.raises(EngineError, match=r"holds a run already \(step_6\); continue it with --resume"):
        _train("epochs=1", out=tmp_path / "run")
    assert _train("epochs=1").directory.name == "points"
    assert _train("epochs=1").directory.name == "points_2"


def test_resuming_with_other_data_is_an_error(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    with pytest.raises(EngineError, match="was written with 6 batches per epoch, this recipe gives 3"):
        _train("train_dataloader.batch_size=16", out=tmp_path / "run", resume=True)
    with pytest.raises(EngineError, match=r"belongs to another model; tensors: 5 of another shape"):
        _train("model.net.width=6", out=tmp_path / "run", resume=True)


def test_a_finished_run_can_be_trained_longer(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    _train("train_cfg.max_epochs=2", out=tmp_path / "run", resume=True)
    assert list_checkpoints(tmp_path / "run")[0] == "step_12"


def test_an_item_does_not_depend_on_the_global_generator_or_the_order():
    config = {"dataset": Points("train", size=8), "batch_size": 4, "shuffle": True}
    loader: Any = build_dataloader(config, seed=3, world_size=1)
    first = torch.cat([batch["image"] for batch in loader])
    torch.manual_seed(99)
    assert torch.equal(first, torch.cat([batch["image"] for batch in loader]))
    loader.batch_sampler.set_epoch(1)
    other = torch.cat([batch["image"] for batch in loader])
    assert not torch.equal(first.sort(0).values, other.sort(0).values)


def test_a_batch_sampler_can_start_anywhere():
    sampler = ResumableBatchSampler(
        torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(range(7)), 2, False)
    )
    assert list(sampler) == [[0, 1], [2, 3], [4, 5], [6]]
    sampler.start = 2
    assert list(sampler) == [[4, 5], [6]]
    assert sampler.indices_of(3) == [6]
    sampler.start, sampler.endless = 5, True
    endless = iter(sampler)
    assert [next(endless) for _ in range(4)] == [[2, 3], [4, 5], [6], [0, 1]]


def test_metrics_hold_no_invalid_json(tmp_path):
    _train("epochs=1", out=tmp_path / "run")
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values() if isinstance(value, float))
