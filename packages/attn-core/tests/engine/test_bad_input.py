"""Random bad input to the shared verbs: one line on stderr, a foreseen exit code, no traceback, no hang."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_task import CLI

from attn_core.testing.commands import answer, assert_foreseen, bad_inputs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert answer(CLI, "train", "--set", "epochs=1").code == 0
    return folder


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
SETTINGS = """
epochs size model model.type model.net model.net.type model.net.width model.net.dropout model.label_smoothing
train_dataloader.batch_size train_dataloader.num_workers train_dataloader.dataset.type train_dataloader.sampler
train_dataloader.dataset.noise train_dataloader.drop_last train_dataloader.shuffle train_dataloader.collate_fn
val_evaluator val_evaluator.topk val_evaluator.type optim_wrapper.optimizer.lr optim_wrapper.optimizer.type
optim_wrapper.optimizer.betas optim_wrapper.type optim_wrapper.amp optim_wrapper.accumulative_counts
optim_wrapper.clip_grad optim_wrapper.clip_grad.max_norm optim_wrapper.paramwise_cfg param_scheduler
param_scheduler.0.begin param_scheduler.0.end param_scheduler.1.T_max param_scheduler.1.type train_cfg.max_epochs
train_cfg.val_interval train_cfg.by_epoch default_hooks.checkpoint.best default_hooks.checkpoint.keep
default_hooks.checkpoint.rule default_hooks.metrics.every_steps custom_hooks custom_hooks.0.momentum
custom_hooks.0.begin_step custom_hooks.0.type randomness.seed device strategy.type strategy.units load_from
activation_checkpointing env_cfg.cudnn_benchmark find_unused_parameters sync_bn log_level variables default_scope
launcher
"""
KEYS = st.sampled_from(SETTINGS.split()) | st.from_regex(r"[a-z_.0-9]{1,12}", fullmatch=True)
VALUES = st.one_of(
    st.integers(-2, 3).map(str),
    st.floats(width=16).map(str),
    st.sampled_from(
        ["true", "none", "[]", "{}", "()", "[1]", "{'type': 'x'}", "SGD", "x.y", "torch.nn", "1e400", "''", "\x00"]
    ),
    TEXT,
)


@bad_inputs
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=2))
def test_any_setting_of_train(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shutil.rmtree("runs", ignore_errors=True)
    given = [f"--set={key}={value}" for key, value in changes]
    assert_foreseen(CLI, "train", "--set", "epochs=1", "--set", "size=16", *given)


@pytest.mark.parametrize("verb", ["eval", "predict", "export", "train", "train resume", "info", "benchmark"])
@bad_inputs
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["/", "..", "~", "a\nb", "/dev/null"]),
)
def test_any_path_and_any_name(tmp_path, monkeypatch, verb, text):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "train resume": ["train", "--resume", f"--out={text}"],
        "predict": ["predict", "--run", "nothing", "--", text],
        "train": ["train", "--set", "epochs=1", "--", text],
    }.get(verb, [verb, "--", text])
    assert_foreseen(CLI, *arguments)


@bad_inputs
@given(st.data())
def test_any_damage_to_a_run(finished, monkeypatch, data):
    monkeypatch.chdir(finished)
    run = Path("runs/damaged")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree("runs/points", run)
    file = run / data.draw(st.sampled_from(sorted(path.name for path in run.iterdir() if path.suffix != ".png")))
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["removed", "cut", "flipped", "replaced", "folder"]))
    if kind == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)))])
    elif kind == "flipped":
        place = data.draw(st.integers(0, len(content) - 1))
        file.write_bytes(
            content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
        )
    elif kind == "replaced":
        file.write_bytes(data.draw(st.sampled_from([b"", b"[]", b"null", b"{}", b"\xff\xfe", b"x = 1", b"x = (" * 99])))
    else:
        os.remove(file)
        if kind == "folder":
            file.mkdir()
    for arguments in (["eval", str(run)], ["predict", "--run", str(run), "--", str(run / "run.json")],
                      ["train", "--resume", "--out", str(run), "--set", "epochs=2"]):  # fmt: skip
        assert_foreseen(CLI, *arguments)
