"""Recipes: found, overridden, checked, written."""

from pathlib import Path

import pytest

from attn_core.engine import ConfigError
from attn_core.engine.config import find_recipe, load_recipe, recipe_names, write_config

RECIPE = Path(__file__).parent / "tiny_task/configs/points.py"


def _load(*overrides: str):
    return load_recipe(RECIPE, overrides, scope="tiny_task")


def test_recipes_are_listed_with_their_first_line():
    assert recipe_names("tiny_task") == {"points": "Points in the plane: 6 epochs of 6 batches, under a second."}


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"train: unknown recipe 'ponts'; did you mean 'points'\?"):
        find_recipe("tiny_task", "ponts")
    with pytest.raises(ConfigError, match=r"there is no recipe file missing/points.py"):
        find_recipe("tiny_task", "missing/points.py")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim_wrapper.optimizer.lr=3e-4", ("optim_wrapper", "optimizer", "lr"), 3e-4),
        ("optim_wrapper.optimizer.betas=(0.9, 0.95)", ("optim_wrapper", "optimizer", "betas"), (0.9, 0.95)),
        ("param_scheduler.0.start_factor=0.5", ("param_scheduler", 0, "start_factor"), 0.5),
        ("optim_wrapper.amp=true", ("optim_wrapper", "amp"), True),
        ("optim_wrapper.clip_grad=none", ("optim_wrapper", "clip_grad"), None),
        ("default_hooks.checkpoint.best=loss", ("default_hooks", "checkpoint", "best"), "loss"),
        ("randomness.deterministic=true", ("randomness", "deterministic"), True),
    ],
)
def test_an_override_is_parsed_and_set(override, path, value):
    found = _load(override)
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)


def test_a_variable_of_the_recipe_changes_what_is_computed_from_it():
    config = _load("epochs=3")
    assert config["train_cfg"]["max_epochs"] == 3
    assert config["param_scheduler"][1]["T_max"] == 4
    assert "epochs" not in config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim_wraper.optimizer.lr=1", r"unknown setting 'optim_wraper'; did you mean 'optim_wrapper'\?"),
        (
            "optim_wrapper.optimizer.lrr=1",
            r"optim_wrapper.optimizer.lrr: unknown setting 'lrr' of torch.optim.AdamW; did you mean 'lr'\?",
        ),
        ("model.net.widht=3", r"unknown setting 'widht' of tiny_task.Net; did you mean 'width'\?"),
        ("train_cfg.max_epoch=3", r"unknown setting 'max_epoch'; did you mean 'max_epochs'\?"),
        ("train_dataloader.batchsize=3", r"unknown setting 'batchsize'; did you mean 'batch_size'\?"),
        ("default_hooks.checkpoint.every_step=3", r"did you mean 'every_steps'\?"),
        ("epoch=3", r"unknown setting 'epoch'; did you mean 'epochs'\?"),
        ("optim_wrapper.optimizer.lr=fast", r"expected a number such as 0.01, got 'fast'"),
        ("optim_wrapper.amp=1", r"expected true or false, got 1"),
        ("model.net=3", r"this is a group with the settings type, width, dropout; set one of them"),
        ("param_scheduler.7.gamma=1", r"param_scheduler is a list of 2, got index '7'"),
        ("model.net.width.x=1", r"model.net.width is 8, it has no parts"),
        ("lr", r"expected key=value such as optim_wrapper.optimizer.lr=3e-4, got 'lr'"),
        ("model.type=tiny_task.Nett", r"tiny_task has no 'Nett'; did you mean 'Net'\?"),
    ],
)
def test_a_wrong_override_is_named_with_the_way_out(override, message):
    with pytest.raises(ConfigError, match=message):
        _load(override)


def test_a_wrong_key_in_a_recipe_file_is_an_error(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(RECIPE.read_text().replace("val_evaluator =", "val_evaluators ="))
    with pytest.raises(ConfigError, match=r"val_dataloader needs a val_evaluator|did you mean 'val_evaluator'"):
        load_recipe(path)
    path.write_text("model = (")
    with pytest.raises(ConfigError, match=r"wrong.py cannot be read: '\(' was never closed"):
        load_recipe(path)
    path.write_text("model = dict(type=undefined_name)")
    with pytest.raises(ConfigError, match=r"NameError: name 'undefined_name' is not defined"):
        load_recipe(path)
    path.write_text("model = dict()")
    with pytest.raises(ConfigError, match=r"the setting 'train_dataloader' is missing"):
        load_recipe(path)


def test_a_resolved_recipe_reads_back_equal_and_executes_nothing(tmp_path):
    config = _load("optim_wrapper.optimizer.betas=(0.9, 0.95)")
    write_config(config, tmp_path / "config.py", "A recipe.")
    assert load_recipe(tmp_path / "config.py", literal=True) == config
    (tmp_path / "config.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'made')!r})\n")
    with pytest.raises(ConfigError, match=r"config\.py, line 1: only assignments are allowed"):
        load_recipe(tmp_path / "config.py", literal=True)
    assert not (tmp_path / "made").exists()
