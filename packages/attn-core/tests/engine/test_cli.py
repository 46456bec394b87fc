"""The command line: one clear line for a user's error, and its exit code."""

import importlib.util
import json
import shutil

import pytest
from tiny_task import CLI

from attn_core.engine.cli import run_cli


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """``cli("train", ...)`` → exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            run_cli(CLI, arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a trained run in ``runs/points``."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as stopped:
            run_cli(CLI, ["train", "--set", "epochs=2"])
    assert stopped.value.code == 0
    return folder / "runs/points"


def test_train_says_the_data_the_model_the_result_and_the_place(cli, tmp_path):
    code, out, err = cli("train", "--set", "epochs=2")
    assert (code, err) == (0, "")
    assert "data: train 48, val 20, test 20 samples; batch 8\n" in out
    assert "model: 130 parameters on CPU, seed 0, run directory runs/points\n" in out
    assert "epoch 2/2  step 12/12  val accuracy " in out
    assert "\ntest accuracy: " in out
    assert "wrote result.json, curves.png, predictions.png to runs/points" in out
    about = json.loads((tmp_path / "runs/points/run.json").read_text())
    assert about["recipe"] == "points"
    assert about["versions"]["torch"]


def test_list_is_a_table_without_the_models_for_tests(cli):
    code, out, err = cli("list")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["recipe", "what"],
        ["points", *["Points", "in", "the", "plane:", "6", "epochs", "of", "6", "batches,", "under", "a", "second."]],
        [],
        ["model", "parameters", "published"],
        ["net", "130"],
        ["wide_net", "7042", "90", "%"],
    ]
    counted = cli("list", "--multiply-adds")[1].splitlines()
    assert [line.split() for line in counted[-3:-1]] == [["model", "parameters", "multiply-adds", "published"],
                                                         ["net", "130", "56"]]  # fmt: skip


def test_info_of_a_recipe_prints_its_docstring_and_its_settings(cli):
    code, out, err = cli("info", "points")
    assert (code, err) == (0, "")
    assert out.startswith("points: Points in the plane: 6 epochs of 6 batches, under a second.\n\n")
    assert "\ntrain_cfg = {'max_epochs': 6, 'val_interval': 1, 'by_epoch': True}\n" in out
    assert "\nvariables = {'epochs': 6, 'size': 48}\n" in out


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["train", "ponts"], 2, "tiny train: unknown recipe 'ponts'; did you mean 'points'?"),
        (["train", "--sed", "3"], 2, "tiny train: no such option: --sed; did you mean --seed?"),
        (["train", "--seed", "x"], 2, "tiny train: invalid value for '--seed': Input should be a valid integer"),
        (["trian"], 2, "tiny: no such command 'trian'; did you mean 'train'?"),
        (
            ["train", "--strategy", "fsdp"],
            2,
            "tiny train: --strategy: 'fsdp' is not one of ddp, fsdp2; did you mean 'fsdp2'?",
        ),
        (
            ["train", "--strategy", "fsdp2"],
            2,
            "tiny train: --strategy fsdp2 needs several processes; use torchrun and --launcher",
        ),
        (
            ["train", "--launcher", "pytorch"],
            2,
            "tiny train: --launcher pytorch needs the variables that torchrun sets; run: ",
        ),
        (["train", "--device", "cuda:77"], 2, "tiny train: device: 'cuda:77' needs GPU 77, torch sees"),
        (["train", "--device", "gpu"], 2, "tiny train: device: 'gpu' is not a device; use auto, cpu, cuda or cuda:<n>"),
        (
            ["train", "--set", "modle.x=1"],
            2,
            "tiny train: --set modle.x: unknown setting 'modle'; did you mean 'model'?",
        ),
        (["train", "--set", "size=1"], 1, "tiny train: Points: one point is not a data set"),
        (["train", "--set", "size=0"], 1, "tiny train: dataloader: the data set Points is empty"),
        (
            ["eval", "nowhere"],
            1,
            "tiny eval: nowhere does not exist; runs are the directories that 'tiny train' writes",
        ),
        (
            ["train", "--set", "optim_wrapper.optimizer.type=Adamm"],
            2,
            "tiny train: optim_wrapper.optimizer.type: ",
        ),
        (["train", "--set", "epochs=abc"], 2, "tiny train: --set epochs: expected a number such as 6, got 'abc'"),
        (["train", "--device", "mps"], 2, "tiny train: device: there is no 'mps' on this machine; use auto, cpu, "),
        (["train", "--device", "meta"], 2, "tiny train: device: there is no 'meta' on this machine; use auto, cpu, "),
        (["train", "--seed", "-1"], 2, "tiny train: invalid value for '--seed': "),
        (["train", "--resume"], 1, "tiny train: no run of points under runs/ to resume; leave --resume out to start"),
        (
            ["train", "--set", "activation_checkpointing=['net.blok']"],
            2,
            "tiny train: activation_checkpointing: ",
        ),
        (["benchmark", "--batch-size", "-1"], 2, "tiny benchmark: invalid value for '--batch-size': "),
        (["predict", "nothing.png"], 1, "tiny predict: nothing.png does not exist"),
        (["info", "nett"], 2, "tiny info: unknown name 'nett'; did you mean 'net'?"),
        (
            ["export", "--format", "onx"],
            2,
            "tiny export: --format: 'onx' is not one of onnx, torch-export; did you mean 'onnx'?",
        ),
        (["export", "--format", "onnx"], 1, "tiny export: no trained run in runs/; train one first: tiny train"),
    ],
)
def test_a_users_error_is_one_line_and_an_exit_code(cli, arguments, code, line):
    found, _, err = cli(*arguments)
    assert found == code, err
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("writer", ["wandb", "tensorboard"])
def test_a_writer_that_is_not_installed_is_one_line(cli, monkeypatch, writer):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == writer else found(name))
    expected = f"tiny train: --{writer} needs the package {writer}; install the extra '{writer}'\n"
    assert cli("train", f"--{writer}") == (2, "", expected)


def test_a_nan_sample_is_one_line(cli):
    code, _, err = cli("train", "--set", "train_dataloader.dataset.bad=3")
    assert code == 1
    assert err.startswith("tiny train: step ")
    assert err.count("\n") == 1


def test_eval_predict_info_list_and_benchmark_answer(cli, finished, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "empty.bin").write_bytes(b"")
    tested = json.loads((finished / "result.json").read_text())["test"]["accuracy"]
    assert cli("eval", str(finished)) == (0, f"test accuracy: {100 * tested:.2f} %\n", "")
    assert cli("predict", "a.bin", "--run", str(finished)) == (0, "a.bin: left\n", "")
    assert cli("predict", "a.bin", "--run", str(finished), "--loud") == (0, "A.BIN: LEFT\n", "")
    assert cli("predict", "empty.bin", "--run", str(finished)) == (1, "", "tiny predict: empty.bin is empty\n")
    assert cli("info", "net") == (0, "name: net\nparameters: 130\nmultiply-adds: 56\n", "")
    assert cli("benchmark", "--json", "rows.json")[0] == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"model": "net", "ms": 1.0}]


def test_export_writes_a_program_that_computes_the_same(cli, finished):
    code, out, err = cli("export", str(finished), "--format", "torch-export", "--out", "net.pt2")
    assert code == 0, err
    assert out.startswith("wrote net.pt2 (any batch size; x → output); largest relative difference ")


def test_export_writes_onnx_that_computes_the_same(cli, finished):
    pytest.importorskip("onnxruntime")
    code, out, err = cli("export", str(finished), "--out", "net.onnx")
    assert code == 0, err
    assert out.startswith("wrote net.onnx (any batch size; x → output); largest relative difference ")


def test_a_damaged_checkpoint_is_skipped_with_a_note(cli, tmp_path):
    assert cli("train", "--out", "run", "--set", "epochs=2")[0] == 0
    path = tmp_path / "run/step_12.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    code, _, err = cli("train", "--out", "run", "--resume")
    assert code == 0, err
    assert err.startswith("note: skipped: load_checkpoint: ")
    assert "the file is truncated; the previous checkpoint is step_8\n" in err


def test_an_option_of_the_package_sets_the_recipe_and_set_comes_after_it(cli):
    short = ("--set", "epochs=1")
    assert "model: 155 parameters" in cli("train", "--width", "9", *short, "--out", "wide")[1]
    narrow = cli("train", "--width", "9", "--set", "model.net.width=5", *short, "--out", "narrow")
    assert "model: 67 parameters" in narrow[1]


def test_a_verb_of_the_package_prints_its_lines_and_its_error(cli):
    assert cli("greet", "you", "--times", "2") == (0, "hello you\nhello you\n", "")
    assert cli("greet", "you", "--times", "0") == (1, "", "tiny greet: --times must be positive, got 0\n")
    assert "Say hello." in cli("greet", "--help")[1]
    assert "did you mean 'greet'?" in cli("gret", "you")[2]


def test_a_group_has_the_verbs_that_it_names_and_its_own(cli, finished):
    assert cli("inner", "greet", "you") == (0, "hello you\n", "")
    code, out, err = cli("inner", "eval", str(finished))
    assert (code, err) == (0, "")
    assert "test accuracy: " in out
    code, _, err = cli("inner", "train")
    assert code == 2
    assert err.startswith("tiny inner: no such command 'train'")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "expected", "line"),
    [
        ("KeyError", 70, "KeyError: 'first line\\nsecond line'"),
        ("RuntimeError", 70, "RuntimeError: first line"),
        ("RecursionError", 70, "RecursionError: first line"),
        ("library", 1, "ValueError: cannot reshape array of size 3 into shape (2,2)"),
    ],
)
def test_an_unexpected_exception_is_one_line_that_names_a_log_with_the_traceback(
    cli, tmp_path, monkeypatch, kind, expected, line
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = cli("fail", kind)
    (log,) = tmp_path.glob("tiny-fail-*.log")
    assert (code, out) == (expected, "begun\n")
    assert err == f"tiny fail: {line}; the traceback is in {log}\n"
    assert "in _fail" in log.read_text()


def test_an_unexpected_exception_is_one_line_where_no_log_can_be_written(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert cli("fail", "RuntimeError")[::2] == (70, "tiny fail: RuntimeError: first line\n")


@pytest.mark.parametrize(
    ("kind", "expected", "err"),
    [
        ("MemoryError", 1, "tiny fail: the machine has too little memory; use less\n"),
        ("OSError", 1, "tiny fail: first line\n"),
        ("module", 1, "tiny fail: this needs the package 'no_such_package', which is not installed\n"),
    ],
)
def test_a_foreseen_exception_needs_no_log(cli, tmp_path, monkeypatch, kind, expected, err):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli("fail", kind)[::2] == (expected, err)
    assert not list(tmp_path.glob("*.log"))


def test_a_reader_that_goes_away_is_no_error(command):
    code, text = command("fail", "pipe")
    assert (code, text) == (141, "begun\n")


def test_runs_of_other_packages_are_no_choice_for_one_that_is_not_there(cli, finished, tmp_path):
    for name, package in (("mine", "tiny"), ("theirs", "other")):
        shutil.copytree(finished, tmp_path / "r" / name)
        about = json.loads((tmp_path / "r" / name / "run.json").read_text())
        (tmp_path / "r" / name / "run.json").write_text(json.dumps({**about, "package": package}))
    for arguments in (["eval", "r/x"], ["train", "--resume", "--out", "r/x"]):
        code, _, error = cli(*arguments)
        assert code == 1
        assert error.strip().endswith("; choose from r/mine")
