"""Pictures of agent and InLine attention show the numbers that the layers use."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from vision_models import create_model
from vision_models.layers.agent import AgentMixing
from vision_models.layers.inline import InLineMixing
from vision_models.pictures.explain import draw, panels_of
from vision_models.pictures.explain.mixing import agent_weights, inline_weights


def test_weights_of_agents_make_the_output() -> None:
    mixing: Any = AgentMixing(8, 2, (3, 4), 4, class_token=True).double()
    nn.init.zeros_(mixing.dwc.weight)
    nn.init.zeros_(mixing.dwc.bias)
    q, k, v = torch.randn(3, 1, 13, 8, dtype=torch.float64)
    collect, read = agent_weights(mixing, q, k, (3, 4))
    out = read @ collect @ v[0].unflatten(1, (2, 4)).transpose(0, 1)
    torch.testing.assert_close(out.transpose(0, 1).flatten(1), mixing(q, k, v, q, (3, 4))[0])


def test_weights_of_a_token_make_the_output() -> None:
    mixing: Any = InLineMixing(8, 2).double()
    nn.init.zeros_(mixing.residual[2].weight)
    nn.init.zeros_(mixing.residual[2].bias)
    q, k, v = torch.randn(3, 1, 12, 8, dtype=torch.float64)
    weights = inline_weights(mixing, q, k, 5)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
    out = torch.einsum("hn,nhd->hd", weights, v[0].unflatten(1, (2, 4))).flatten()
    torch.testing.assert_close(out, mixing(q, k, v, q, (3, 4))[0, 5])


@pytest.mark.parametrize("kind", ["agent", "inline"])
@pytest.mark.parametrize(("host", "columns"), [("deit", 3), ("pvt", 3), ("swin", 3), ("cswin", 2)])
def test_every_stage_with_such_a_block_has_two_panels(kind: str, host: str, columns: int) -> None:
    net = create_model(f"test_{kind}_{host}").eval()
    panels: Any = panels_of(net)
    with torch.no_grad():
        found = panels(net, torch.randn(3, 64, 96), (0.2, 0.9))
    assert [len(column) for column in found] == [2] * columns
    for column in found:
        assert all(0 <= float(panel.light.min()) <= float(panel.light.max()) <= 1.00001 for panel in column)


def test_picture_is_drawn(tmp_path: Any) -> None:
    net = create_model("test_agent_swin").eval()
    draw(net, torch.randn(3, 64, 64), Image.new("RGB", (64, 64)), [("cat", 0.9)], (0.5, 0.5), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
