"""The peers that copy windows compute the same."""

from typing import Any

import pytest
import torch
from torch import nn

from vision_models import create_model
from vision_models.bench.windows import copied, natten_rows


@pytest.mark.parametrize("name", ["test_dinat_s", "test_moh_transnext"])
def test_the_peer_computes_the_same_numbers_and_gradients(name: str) -> None:
    ours: Any = create_model(name).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 3, 36, 52, dtype=torch.float64)
    results = []
    for net in (ours, copied(ours)):
        logits = net(x)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(net.parameters()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_a_model_without_windows_has_no_peer() -> None:
    with pytest.raises(ValueError, match="benchmark: NAT with attention to the whole map has no peer to compare with"):
        copied(create_model("test_dinat_s", attention="softmax"))


@pytest.mark.filterwarnings("ignore")  # of natten and of flex_attention, about their own arguments
def test_rows_beside_natten_are_those_of_equal_networks() -> None:
    pytest.importorskip("natten")
    net = create_model("test_dinat_s", num_heads=(1, 1, 1, 1), embed_dim=16)
    (row,) = natten_rows("test_dinat_s", net, torch.randn(1, 3, 48, 48))
    assert float(row["error"]) < 1e-4
    assert not natten_rows("test_dinat_s", create_model("test_dinat_s"), torch.empty(0))  # its heads are 6 wide
    assert not natten_rows("test_moh_transnext", create_model("test_moh_transnext"), torch.empty(0))
