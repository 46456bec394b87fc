"""TAP's pools and ADL: dense formulas beside ours, memory, and single images."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.testing import peak_memory
from vision_models import create_model
from vision_models.layers import token_pooling
from vision_models.layers.token_pooling import (
    Attended,
    TokenPooling,
    attention_of,
    dilated_mean,
    diversification_loss,
)


def dense_loss(layers: list[Attended], threshold: float) -> Tensor:
    """The loss from whole attention maps, one image and one query after another."""
    found = []
    for q, k, gate in layers:
        scores = q @ k.mT * q.shape[3] ** -0.5
        attention = (scores if gate is None else gate * scores).softmax(3).mean(1)
        count = k.shape[2]
        for rows in attention:
            mean = rows.sum(0) / count
            mean = mean * (mean > threshold / count)
            for row in rows:
                row = row * (row > threshold / count)
                length = row.square().sum().sqrt() * mean.square().sum().sqrt()
                found.append((row * mean).sum() / length if length > 0 else 0 * row.sum())
    return torch.stack(found).mean()


def layers_of(count: int, gated: bool, batch: int = 2) -> list[Attended]:
    def one() -> Attended:
        q, k = (2 * torch.randn(batch, 2, count, 4, dtype=torch.float64) for _ in range(2))
        gate = torch.rand(2, count, count, dtype=torch.float64) if gated else None
        k[:, :, 3] *= 3  # a token that everyone sees, or the mean row has nothing above the threshold
        return Attended(q, k, gate)

    return [one(), one()]


@pytest.mark.parametrize("threshold", [1.0, 2.0])
@pytest.mark.parametrize(("gated", "rows"), [(False, 128), (False, 5), (True, 5)])
def test_the_loss_and_its_gradient_equal_the_dense_ones(
    threshold: float, gated: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_pooling, "ROWS", rows)
    layers = layers_of(17, gated)
    inputs = [t.requires_grad_() for layer in layers for t in layer if t is not None]
    losses = [function(layers, threshold) for function in (diversification_loss, dense_loss)]
    assert losses[1] > 0.1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    for ours, dense in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert (ours - dense).abs().max() <= 1e-10 * dense.abs().max()


def test_the_loss_is_zero_while_nothing_exceeds_the_threshold() -> None:
    layers = [Attended(torch.zeros(1, 2, 9, 4, requires_grad=True), torch.randn(1, 2, 9, 4))]
    loss = diversification_loss(layers)
    loss.backward()
    assert loss.item() == 0
    assert layers[0].q.grad is not None
    assert layers[0].q.grad.abs().max() == 0


@pytest.mark.parametrize("rows", [128, 5])
def test_one_image_gives_the_loss_of_its_duplicates(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_pooling, "ROWS", rows)
    single = layers_of(17, gated=False, batch=1)
    double = [Attended(torch.cat([q, q]), torch.cat([k, k])) for q, k, _ in single]
    torch.testing.assert_close(diversification_loss(double), diversification_loss(single), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_memory_of_the_loss_grows_with_the_tokens_not_with_their_square() -> None:
    def peak(count: int) -> int:
        q, k = (torch.randn(1, 1, count, 8, requires_grad=True) for _ in range(2))
        return peak_memory(lambda: diversification_loss([Attended(q, k)]).backward())

    assert peak(2048) <= 2.5 * peak(1024)


def test_means_are_divided_by_nine_at_the_border_too() -> None:
    ones = torch.ones(1, 5, 6, 2)
    assert dilated_mean(ones, 1)[0, 0, 0, 0].item() == pytest.approx(4 / 9)
    assert dilated_mean(ones, 1)[0, 2, 2, 0].item() == pytest.approx(1)
    assert dilated_mean(ones, 3)[0, 0, 0, 0].item() == pytest.approx(4 / 9)
    assert dilated_mean(ones, 9)[0, 2, 2, 0].item() == pytest.approx(1 / 9)
    x = torch.randn(2, 5, 6, 4)
    kernel = torch.full((4, 1, 3, 3), 1 / 9)
    expected = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=2, dilation=2, groups=4).permute(0, 2, 3, 1)
    torch.testing.assert_close(dilated_mean(x, 2), expected)


def test_weights_of_scales_sum_to_one_and_follow_the_temperature() -> None:
    pooling, x = TokenPooling(6).eval(), torch.randn(2, 4, 5, 6)
    weights = pooling.weights(x)  # pyright: ignore[reportCallIssue]
    assert weights.shape == (2, 4, 5, 4)
    torch.testing.assert_close(weights.sum(3), torch.ones(2, 4, 5))
    pooling.temperature = 1e6  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(pooling.weights(x), torch.full((2, 4, 5, 4), 0.25), rtol=1e-4, atol=0)  # pyright: ignore[reportCallIssue]
    assert torch.equal(TokenPooling(6, scales=1).eval()(x), x)


@pytest.mark.parametrize("name", ["test_tap_rvt", "test_tap_fan"])
def test_a_network_hands_out_what_it_attends_with_only_when_asked(name: str) -> None:
    net, x = create_model(name, drop_path_rate=0.0), torch.randn(2, 3, 64, 64)
    with attention_of(net) as seen:
        logits = net(x)
    assert len(seen) == 5 - (name == "test_tap_fan")
    assert (seen[0].gate is not None) == (name == "test_tap_rvt")
    with torch.no_grad():
        net(x)
    assert len(seen) == 5 - (name == "test_tap_fan")
    (logits.sum() + diversification_loss(seen, 0.5)).backward()
    message = "no attention of Linear can be observed; RVT and FAN have such"
    with pytest.raises(ValueError, match=message), attention_of(nn.Linear(1, 1)):
        pass
    with pytest.raises(ValueError, match="diversification_loss: needs at least one layer, got none"):
        diversification_loss([])


def test_the_loss_takes_part_in_gradient_checkpointing() -> None:
    net, x = create_model("test_tap_fan").double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        with attention_of(net) as seen:
            net(x)
        diversification_loss(seen, 0.5).backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-8, atol=1e-12)
