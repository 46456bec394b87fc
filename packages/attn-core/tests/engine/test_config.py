"""Recipes: found, overridden, checked, written."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.engine import ConfigError, PackageId, build
from attn_core.engine.config import load_recipe, write_config
from attn_core.engine.errors import BuildError
from attn_core.engine.failures import describe
from attn_core.engine.recipes import find_recipe, read_literals, read_recipe, recipe_names

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
    assert config["variables"] == {"epochs": 3, "size": 48}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim_wraper.optimizer.lr=1", r"unknown setting 'optim_wraper'; did you mean 'optim_wrapper'\?"),
        (
            "optim_wrapper.optimizer.lrr=1",
            r"optim_wrapper.optimizer.lrr: unknown setting 'lrr' of torch.optim.AdamW; did you mean 'lr'\?",
        ),
        ("model.net.widht=3", r"unknown setting 'widht' of tiny_task.Net; did you mean 'width'\?"),
        ("net.width=3", r"'net' is part of a setting; did you mean 'model.net.width'\?"),
        ("train_cfg.max_epoch=3", r"unknown setting 'max_epoch'; did you mean 'max_epochs'\?"),
        ("train_dataloader.batchsize=3", r"unknown setting 'batchsize'; did you mean 'batch_size'\?"),
        ("default_hooks.checkpoint.every_step=3", r"did you mean 'every_steps'\?"),
        ("epoch=3", r"unknown setting 'epoch'; did you mean 'epochs'\?"),
        ("steps=3", r"unknown setting 'steps': the length of this recipe is given in epochs, --set epochs=…$"),
        ("optim_wrapper.optimizer.lr=fast", r"expected a number such as 0.01, got 'fast'"),
        ("optim_wrapper.amp=1", r"expected true or false, got 1"),
        ("param_scheduler=3", r"--set param_scheduler: expected a list such as \[a, b\], got 3"),
        ("load_from=3", r"load_from is 3, expected a name"),
        ("model.net=3", r"this is a group with the settings type, width, dropout; set one of them"),
        ("param_scheduler.7.gamma=1", r"param_scheduler is a list of 2, got index '7'"),
        ("model.net.width.x=1", r"model.net.width is 8, it has no parts"),
        ("epochs=abc", r"--set epochs: expected a number such as 6, got 'abc'"),
        ("epochs=0", r"train_cfg.max_epochs: expected a whole number of at least 1, got 0"),
        ("epochs=2.5", r"train_cfg.max_epochs: expected a whole number of at least 1, got 2.5"),
        ("train_dataloader.batch_size=-1", r"batch_size: expected a whole number of at least 1, got -1"),
        ("train_dataloader.num_workers=-1", r"num_workers: expected a whole number of at least 0, got -1"),
        ("optim_wrapper.optimizer.type=Adamm", r"optimizer.type: there is no 'Adamm'; did you mean 'Adam'\?$"),
        ("train_dataloader.dataset.type=Point", r"dataset.type: there is no 'Point'; did you mean 'Points'\?$"),
        ("val_evaluator.type=Acuracy", r"val_evaluator.type: there is no 'Acuracy'; did you mean 'Accuracy'\?$"),
        ("lr", r"expected key=value such as optim_wrapper.optimizer.lr=3e-4, got 'lr'"),
        ("model.type=tiny_task.Nett", r"tiny_task has no 'Nett'; did you mean 'Net'\?"),
        ("val_evaluator.type=0", r"val_evaluator.type: expected the name of a class, got 0"),
        ("model.net.type=[1]", r"model.net.type: expected the name of a class, got \[1\]"),
        ("train_dataloader.dataset.type=none", r"dataset.type: expected the name of a class, got None"),
        ("model=none", r"model: expected dict\(type=..., ...\), got None"),
        ("model.label_smoothing=[1]", r"model.label_smoothing: expected a number, got \[1\]"),
        ("model.net.width=2.5", r"model.net.width: expected a whole number, got 2.5"),
        ("optim_wrapper.optimizer.betas=3", r"optim_wrapper.optimizer.betas: expected \[.*\], got 3"),
        ("train_dataloader.drop_last=x", r"train_dataloader.drop_last: expected true or false, got 'x'"),
        ("custom_hooks=[3]", r"custom_hooks: expected a list or none, got \[3\]"),
        ("optim_wrapper.clip_grad={'max_norm': 'x'}", r"clip_grad.max_norm: expected a number, got 'x'"),
    ],
)
def test_a_wrong_override_is_named_with_the_way_out(override, message):
    with pytest.raises(ConfigError, match=message):
        _load(override)


def test_what_a_class_stumbles_over_is_laid_to_its_settings_and_the_traceback_kept():
    with pytest.raises(BuildError, match=r"Linear cannot be built with these settings \(RuntimeError: ") as caught:
        build({"type": "torch.nn.Linear", "in_features": -1, "out_features": 2})
    code, line = describe(caught.value, PackageId("tiny", "tiny_task", "points"), "train")
    assert code == 2
    log = Path(line.rpartition("; the traceback is in ")[2])
    assert "Traceback" in log.read_text()
    log.unlink()


def test_a_type_is_found_by_its_last_name_beside_the_one_it_replaces():
    assert _load("optim_wrapper.optimizer.type=SGD")["optim_wrapper"]["optimizer"]["type"] == "torch.optim.SGD"
    assert _load("model.net.type=HiddenBlock", "model.net.width=2")["model"]["net"]["type"] == "tiny_task.HiddenBlock"
    assert _load("param_scheduler.1.type=PolyLR", "param_scheduler=[]")["param_scheduler"] == []


def test_a_wrong_key_in_a_recipe_file_is_an_error(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(RECIPE.read_text().replace("val_evaluator =", "val_evaluators ="))
    with pytest.raises(
        ConfigError, match=r"wrong.py, line \d+: unknown setting 'val_evaluators'; did you mean 'val_ev"
    ):
        load_recipe(path)
    path.write_text("model = (")
    with pytest.raises(ConfigError, match=r"wrong.py cannot be read: '\(' was never closed"):
        load_recipe(path)
    path.write_text("\nmodel = dict(type=lambda: 3)")
    with pytest.raises(ConfigError, match=r"cannot be imported by a name; move it to a module of a package"):
        load_recipe(path)
    path.write_text("model = dict(type={1, 2})")
    with pytest.raises(ConfigError, match=r"model.type is a set; recipes hold numbers, strings, lists, dicts, and cl"):
        load_recipe(path)
    path.write_text("import no_such_module\n")
    with pytest.raises(ConfigError, match=r"wrong.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"):
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


# ---- bases

CHILD = """'''A child.'''
from attn_core.engine import read_base

with read_base():
    from .points import *

size = 24
train_cfg["val_interval"] = 2
model = dict(model, label_smoothing=0.0)
"""


@pytest.fixture
def child(tmp_path):
    (tmp_path / "points.py").write_text(RECIPE.read_text())
    (tmp_path / "child.py").write_text(CHILD)
    return tmp_path / "child.py"


def test_a_recipe_continues_another_one(child):
    base, config = _load(), load_recipe(child, scope="tiny_task")
    assert config["train_cfg"] == {**base["train_cfg"], "val_interval": 2}
    assert config["model"] == {**base["model"], "label_smoothing": 0.0}
    assert config["optim_wrapper"] == base["optim_wrapper"]
    assert read_recipe(child).about == "A child."


def test_a_variable_of_the_base_changes_what_the_base_computes(child):
    config = load_recipe(child, ["epochs=3", "size=12"])
    assert config["train_cfg"]["max_epochs"] == 3
    assert config["param_scheduler"][1]["T_max"] == 4
    assert config["train_dataloader"]["dataset"]["size"] == 12
    assert config["variables"] == {"epochs": 3, "size": 12}


def test_the_text_of_a_recipe_with_a_base_needs_no_other_file(child, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/recipe.py").write_text(read_recipe(child).text)
    assert load_recipe(tmp_path / "alone/recipe.py") == load_recipe(child)


def test_a_base_by_its_module_name(tmp_path):
    path = tmp_path / "child.py"
    path.write_text(CHILD.replace("from .points", "from tiny_task.configs.points"))
    assert load_recipe(path, ["epochs=2"])["train_cfg"]["max_epochs"] == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from .points import *", "from .pints import *", r"child.py, line 5: there is no base .pints"),
        ("from .points import *", "from nowhere.at_all import *", r"line 5: there is no base nowhere.at_all"),
        ("from .points import *", "from .child import *", r"child.py, line 5: \S*child.py is read in a circle"),
        ("from .points import *", "import json", r"line 5: only from ... import \* under read_base\(\)"),
    ],
)
def test_a_wrong_base_is_named(child, old, new, message):
    child.write_text(CHILD.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_recipe(child)


def test_a_recipe_may_compute_with_what_it_imports(tmp_path):
    path = tmp_path / "computed.py"
    text = RECIPE.read_text()
    path.write_text(
        text[: text.index("param_scheduler")]
        + """
from attn_core.engine import warmup_cosine
param_scheduler = warmup_cosine(epochs, 2, start_factor=0.1, eta_min=0.0)
"""
        + text[text.index("train_cfg") :]
    )
    first, second = load_recipe(path)["param_scheduler"]
    assert first == {
        "type": "mmengine.optim.LinearLR", "start_factor": 0.1, "begin": 0, "end": 2, "by_epoch": True,
        "convert_to_iter_based": True,
    }  # fmt: skip
    assert second == {
        "type": "mmengine.optim.CosineAnnealingLR", "begin": 2, "end": 6, "T_max": 4, "eta_min": 0.0,
        "by_epoch": True, "convert_to_iter_based": True,
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "config.py"
    write_config({"variables": {"x": value}}, path, "Any.")
    assert read_literals(path) == {"variables": {"x": value}}
