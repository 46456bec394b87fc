"""LoRA of the library peft on every linear layer: it has to act before what follows the layer, such as a fused GELU."""

from typing import Any

import pytest
import torch
from torch import nn

from vision_models import create_model, list_models


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("test_")])
@torch.no_grad()
def test_adapters_beside_the_layers_compute_what_they_do_merged_into_them(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = create_model(name).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    plain = model(x)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=linear))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.3)
    beside = wrapped(x)
    assert not torch.allclose(beside, plain, rtol=1e-3)
    torch.testing.assert_close(wrapped.merge_and_unload()(x), beside, rtol=1e-9, atol=1e-11)
