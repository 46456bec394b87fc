"""Options of the engine's parts that other tests leave at their default: another value changes what it says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_core.engine import ClassificationTask
from attn_core.engine import runner as runner_module
from attn_core.engine.hooks import CheckpointHook
from attn_core.engine.loops import EpochLoop
from attn_core.engine.reporting import ProgressHook
from attn_core.engine.runner import Runner

COUNT = 6


class Seen(nn.Module):
    """Keeps the images that it is given, and answers with the same logits whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(COUNT, COUNT, generator=torch.Generator().manual_seed(0)))
        self.image = torch.empty(0)

    def forward(self, image: Tensor) -> Tensor:
        self.image = image
        return self.logits


def trained_on(**options: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images that the network saw, their mean colors, and the loss; image i is label i and has channel i alone."""
    net = Seen()
    image = torch.eye(COUNT)[:, :, None, None].expand(-1, -1, 8, 8)
    loss = ClassificationTask(net, **options).loss(image, torch.arange(COUNT))["loss"]
    return net.image, net.image.mean((2, 3)), loss


def entropy(target: Tensor) -> Tensor:
    return -(target * Seen().logits.log_softmax(1)).sum(1).mean()


def test_label_smoothing_is_the_share_of_the_target_that_all_classes_get() -> None:
    _, color, loss = trained_on(label_smoothing=0.3)
    assert torch.equal(color, torch.eye(COUNT))
    torch.testing.assert_close(loss, entropy(0.7 * torch.eye(COUNT) + 0.3 / COUNT))


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_targets_are_mixed_by_what_the_images_show(option: str) -> None:
    """Mixup blends every pixel alike, CutMix pastes pixels; either way the target is the mean color."""
    for seed in range(3):
        torch.manual_seed(seed)
        image, color, loss = trained_on(**{option: 1.0})
        assert not torch.equal(color, torch.eye(COUNT))
        torch.testing.assert_close(loss, entropy(color))
        if option == "mixup":
            torch.testing.assert_close(image, color[:, :, None, None].expand_as(image))
        else:
            assert set(image.unique().tolist()) == {0.0, 1.0}


def test_with_mixup_and_cutmix_each_batch_draws_one() -> None:
    pasted = []
    for seed in range(12):
        torch.manual_seed(seed)
        image, color, loss = trained_on(mixup=1.0, cutmix=1.0)
        torch.testing.assert_close(loss, entropy(color))
        pasted.append(set(image.unique().tolist()) == {0.0, 1.0})
    assert 0 < sum(pasted) < len(pasted)


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_a_larger_beta_mixes_more_evenly(option: str) -> None:
    spread = []
    for beta in (0.2, 20.0):
        torch.manual_seed(0)
        shares = torch.stack([trained_on(**{option: beta})[1].amax(1) for _ in range(30)])
        spread.append(float(shares.mean().detach()))
    assert spread[1] + 0.1 < spread[0]  # the larger part of an image


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, [3, 6, 9, 12]),
        ({"every_epochs": 2}, [6, 12]),
        ({"every_epochs": None}, [12]),
        ({"every_epochs": None, "every_steps": 5}, [5, 10, 12]),
        ({"every_epochs": 2, "every_steps": 4}, [4, 6, 8, 12]),
    ],
    ids=str,
)
def test_checkpoints_are_due_every_so_many_epochs_and_steps(options: dict[str, Any], written: list[int]) -> None:
    loop = EpochLoop.__new__(EpochLoop)
    run: Any = SimpleNamespace(max_iters=12, train_loop=loop, train_dataloader=range(3))
    hook = CheckpointHook(**options)
    assert [step for step in range(1, 13) if hook._due(run, step)] == written


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (1e9, 0)])
def test_plain_progress_comes_every_so_many_seconds(
    seconds: float, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = SimpleNamespace(get_scalar=lambda _: SimpleNamespace(current=lambda: 0.5))
    hook = ProgressHook(every_seconds=seconds)
    for step in range(3):
        hook.after_train_iter(SimpleNamespace(rank=0, message_hub=hub, iter=step, max_iters=3, max_epochs=1), step)
    assert capsys.readouterr().out.count("loss 0.5000") == lines


@pytest.mark.parametrize(
    ("settings", "synced", "unused"),
    [({}, False, False), ({"sync_bn": True}, True, False), ({"find_unused_parameters": True}, False, True)],
)
def test_a_run_of_several_processes_syncs_norms_and_looks_for_unused_parameters_if_asked(
    settings: dict[str, bool], synced: bool, unused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, bool] = {}

    def spread(model: nn.Module, *_: Any, find_unused_parameters: bool) -> nn.Module:
        found["unused"] = find_unused_parameters
        return model

    monkeypatch.setattr(runner_module, "spread", spread)
    run: Any = SimpleNamespace(cfg=settings, distributed=True, device=torch.device("cpu"), strategy={})
    model = Runner.wrap_model(run, None, nn.Sequential(nn.BatchNorm2d(3)))
    assert isinstance(model[0], nn.SyncBatchNorm) == synced  # pyright: ignore[reportIndexIssue]
    assert found["unused"] == unused
