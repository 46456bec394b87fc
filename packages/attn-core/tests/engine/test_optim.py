"""The optimizer's groups: one for each setting, and every parameter in them once."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from attn_core.engine.optim import GroupedConstructor, OptimWrapper


class Tied(nn.Module):
    """Tokens to logits through one table, as in language models whose head is their embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(ids)))


def test_a_shared_parameter_is_updated_once_in_a_step() -> None:
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3}
    ours, plain = Tied(), Tied()
    plain.load_state_dict(ours.state_dict())
    config = {"type": OptimWrapper, "optimizer": {"type": torch.optim.AdamW, **settings}}
    optimizer = GroupedConstructor(config, {"norm_decay_mult": 0.0})(ours).optimizer
    reference = torch.optim.AdamW(
        [{"params": [plain.embedding.weight]}, {"params": plain.norm.parameters(), "weight_decay": 0.0}], **settings
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(ours.parameters())) == 3
    ids = torch.arange(7)
    for _ in range(3):
        for net, steps in ((ours, optimizer), (plain, reference)):
            steps.zero_grad()
            F.cross_entropy(net(ids), ids.flip(0)).backward()
            steps.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
