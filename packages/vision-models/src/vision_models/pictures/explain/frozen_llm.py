"""Pictures of language layers in a ViT: what the token at the point attends to, and the length of all tokens after."""

from typing import Any

import torch
from torch import Tensor

from vision_models.models.frozen_llm import FrozenLLM, LanguageBlock, LlamaAttention
from vision_models.pictures.explain import deit
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, token_at


def panels(net: FrozenLLM, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Columns of DeiT, then one for each language layer, and the length of what all of them add to each token."""
    columns = deit.panels(net, image, point)
    blocks = [block for block in net.blocks if isinstance(block, LanguageBlock)]
    layers = [module for block in blocks for module in block.modules() if isinstance(module, LlamaAttention)]
    rows, width = net.tokens(image[None])[1]
    row, column = token_at(point, (rows, width))
    frames = [(row, column, 1, 1)]
    seen = inputs_of(net, [*layers, *blocks], image)
    for number, layer in enumerate(layers, start=1):
        light = brightness(attention_of(layer, seen[layer], 1 + row * width + column)[1:].view(rows, width))
        columns.append([Panel(f"language layer {number}: attention", light, frames=frames)])
    for block in blocks:
        length = block(seen[block])[0, 1:].norm(dim=1).view(rows, width)
        columns.append([Panel("length of tokens behind it", brightness(length), frames=frames)])
    return columns


def attention_of(layer: LlamaAttention, x: Tensor, token: int) -> Tensor:
    """Mean over heads of what a token attends to: x (1, N, width) → (N,)."""
    linears: tuple[Any, ...] = (layer.wq, layer.wk)
    q, k = (linear(x)[0].unflatten(1, (layer.num_heads, -1)).transpose(0, 1) for linear in linears)
    return torch.softmax(q[:, token : token + 1] @ k.mT * q.shape[-1] ** -0.5, -1)[:, 0].mean(0)
