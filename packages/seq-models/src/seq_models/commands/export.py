"""``seq-models export``: a language model as a function of its tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from attn_core.engine import ExportTarget, TrainedRun
from seq_models.models import create_model


class _Scores(nn.Module):
    """A model as a function of tensors to tensors, for other runtimes."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        from seq_models.language.language_model import CausalLM

        if isinstance(self.net, CausalLM):
            return self.net(first, use_cache=False).logits
        return self.net(first, *others)


def export_target(run: TrainedRun | str) -> ExportTarget:
    """Logits of a language model as a function of its tokens.

    Raises:
        ValueError: a Pointer Network: its answer is a search, not a graph.
    """
    from seq_models.models.pointer_network import PointerNetwork

    torch.manual_seed(0)
    net: Any = create_model(run).eval() if isinstance(run, str) else run.model.net
    net.requires_grad_(False)  # torch's counter of operations looks for gradients even where none are taken
    name = run if isinstance(run, str) else run.directory.name
    if isinstance(net, PointerNetwork):
        raise ValueError(f"{name} is a Pointer Network, whose answer is a search; export offers language models")
    return ExportTarget(_Scores(net), (torch.randint(net.config.vocab_size, (2, 32)),), name)
