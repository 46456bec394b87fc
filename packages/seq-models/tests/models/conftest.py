"""The causal language models that every contract is tested on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models.language.language_model import CausalLM
from seq_models.models import create_model, list_models

LENGTH = 19


def _is_causal(name: str) -> bool:
    with torch.device("meta"):
        return isinstance(create_model(name), CausalLM)


NAMES = [name for name in list_models() if name.startswith("test_") and _is_causal(name)]


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    net: Any = create_model(request.param).double().eval()
    with torch.no_grad():  # larger weights: what leaks, leaks visibly
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return net


@pytest.fixture
def ids(model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size - 1, (3, LENGTH))
