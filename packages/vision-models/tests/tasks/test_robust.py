"""Training with ADL, and accuracy under each corruption."""

from typing import Any

import pytest
import torch

from vision_models import create_model
from vision_models.layers.token_pooling import attention_of, diversification_loss
from vision_models.tasks.robust import CorruptionAccuracy, DiverseAttentionTask


def test_the_loss_is_cross_entropy_and_weighted_diversity_of_the_same_pass() -> None:
    net: Any = create_model("test_tap_fan", num_classes=4, drop_path_rate=0.0)
    x, label = torch.randn(3, 3, 64, 64), torch.tensor([0, 2, 3])
    losses = DiverseAttentionTask(net, diversity=0.5, threshold=0.7).loss(x, label)
    with attention_of(net) as seen:
        logits = net(x)
    torch.testing.assert_close(losses["loss"], torch.nn.functional.cross_entropy(logits, label))
    torch.testing.assert_close(losses["loss_diversity"], 0.5 * diversification_loss(seen, 0.7))
    plain = DiverseAttentionTask(net, diversity=0.0).loss(x, label)
    assert plain.keys() == {"loss"}
    with pytest.raises(ValueError, match=r"diversity and threshold must not be negative, got -1 and 2\.0"):
        DiverseAttentionTask(net, diversity=-1)


def test_accuracy_is_told_apart_by_corruption() -> None:
    task = DiverseAttentionTask(create_model("test_tap_fan", num_classes=4).eval())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        best = task.net(x).argmax(1)
        label = (best + torch.tensor([0, 0, 1, 1])) % 4  # the last two are wrong
        samples = task.predict(x, label, corruption=torch.tensor([0, 1, 1, 0]))
        assert "corruption" not in task.predict(x, label)[0]
    metric = CorruptionAccuracy(("noise", "blur"))
    metric.process(None, samples)
    assert metric.compute_metrics(metric.results) == {"accuracy": 0.5, "accuracy_noise": 0.5}
