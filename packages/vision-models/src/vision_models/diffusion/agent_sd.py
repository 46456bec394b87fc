"""AgentSD: agent attention for the UNet of a Stable Diffusion pipeline of diffusers, without training.

Paper: Han et al., Agent Attention, ECCV 2024, arXiv 2312.08874, section 4.5. Official code: LeapLabTHU/Agent-Attention,
``agentsd``, built on token merging (Bolya and Hoffman, CVPR Workshops 2023, arXiv 2303.17604).

The same as there: every number, in the self-attention of the blocks. Tokens that resemble one of the destinations, one
in each cell of the map, are merged into it; a second, coarser merge of the same tokens gives the agents; values are
added to the result; merged tokens get the result of their destination.

What differs: the official code patches the classes of the original Stable Diffusion repository, and fails with
diffusers. Here attention processors are put in place and taken away again, which leaves the UNet as it was. A ratio of
0 merges nothing and leaves every number as it was (there: an error, or a batch of two split in halves). Merging around
cross-attention and MLP, which the authors advise against, is left out.

Numbers are checked in ``tests/diffusion/test_agent_sd.py`` against a formulation with loops.

Shapes: the UNet's own.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_core import attention

__all__ = ["AgentSD"]


class AgentSD:
    """Applies agent attention to a UNet or pipeline, as a context manager or with :meth:`apply` and :meth:`remove`.

    >>> with AgentSD(pipe):
    ...     image = pipe("a photo of an owl").images[0]

    Settings are read at each step, so a callback may change them; the paper starts with ``cell=(4, 4), ratio=0.4,
    agent_ratio=0.95`` and goes on with ``cell=(2, 2), agent_ratio=0.5`` after 20 of 50 steps.

    Args:
        model: a ``UNet2DConditionModel``, or a pipeline that has one as ``unet``.
        ratio: part of the tokens that is merged away; at most 1 − 1/(cell area) can be. The official default 0.5
            leaves no room for agents in cells of 2×2, of which at least 1/4 of the tokens remain.
        agent_ratio: the same for the agents, which are used if they are less than half as many as the tokens.
        cell: rows and columns of a cell, each of which has one destination.
        max_downsample: attention on maps smaller than the latent by more than this stays as it is.
        scale_exponent: tokens read from agents with the scale d^(−½·scale_exponent).
        shortcut: factor of the values that are added.
        upcast: products in float32, for Stable Diffusion 2.1.
        use_rand: destinations are drawn at random, unless the batch is odd (then prompted and unprompted images would
            merge differently); else the first token of each cell.
        generator: on the CPU; by default a copy of torch's at the first use, which is left as it was.

    Raises:
        ValueError: a setting out of range, a model without transformer blocks, or one that has AgentSD already.
    """

    def __init__(
        self,
        model: Any,
        *,
        ratio: float = 0.4,
        agent_ratio: float = 0.8,
        cell: tuple[int, int] = (2, 2),
        max_downsample: int = 1,
        scale_exponent: float = 0.3,
        shortcut: float = 0.075,
        upcast: bool = False,
        use_rand: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("ratio", ratio), ("agent_ratio", agent_ratio)):
            if not 0 <= value < 1:
                raise ValueError(f"AgentSD: {name} must lie in [0, 1), got {name}={value}")
        if len(cell) != 2 or min(cell) < 1:
            raise ValueError(f"AgentSD: cell must be two positive numbers, got cell={cell}")
        if max_downsample < 1:
            raise ValueError(f"AgentSD: max_downsample must be at least 1, got max_downsample={max_downsample}")
        self.unet: nn.Module = getattr(model, "unet", model)
        self.ratio = ratio
        self.agent_ratio = agent_ratio
        self.cell = cell
        self.max_downsample = max_downsample
        self.scale_exponent = scale_exponent
        self.shortcut = shortcut
        self.upcast = upcast
        self.use_rand = use_rand
        self.generator = generator
        self.latent: tuple[int, int] | None = None  # rows and columns of the UNet's input in this call
        self._handles: list[Any] = []
        self._replaced: list[tuple[Any, Any]] = []

    def apply(self) -> "AgentSD":
        """Put the processors in place."""
        blocks: list[Any] = [m for m in self.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
        if not blocks:
            raise ValueError(
                f"AgentSD: {type(self.unet).__name__} has no BasicTransformerBlock; pass a pipeline of diffusers or "
                "its UNet2DConditionModel"
            )
        if any(isinstance(block.attn1.processor, AgentProcessor) for block in blocks):
            raise ValueError("AgentSD: the model has agent attention already; remove() it first")
        self._handles.append(self.unet.register_forward_pre_hook(self._see_latent, with_kwargs=True))
        for block in blocks:
            processor = AgentProcessor(self, block.attn1.processor)
            self._replaced.append((block.attn1, block.attn1.processor))
            block.attn1.set_processor(processor)
            self._handles.append(block.register_forward_pre_hook(processor.see_tokens, with_kwargs=True))
        return self

    def remove(self) -> None:
        """Put the former processors back."""
        for handle in self._handles:
            handle.remove()
        for attn, processor in self._replaced:
            attn.set_processor(processor)
        self._handles, self._replaced = [], []

    def __enter__(self) -> "AgentSD":
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _see_latent(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.latent = (sample.shape[2], sample.shape[3])

    def merging(self, tokens: Tensor) -> "TokenMerging | None":
        """Which of the tokens (B, N, C) to merge; None if none or if their map is too small."""
        if self.latent is None:
            return None
        count = tokens.shape[1]
        downsample = math.ceil(math.sqrt((self.latent[0] * self.latent[1]) // count))
        merged = int(count * self.ratio)
        if downsample > self.max_downsample or merged <= 0:
            return None
        grid = math.ceil(self.latent[0] / downsample), math.ceil(self.latent[1] / downsample)
        if grid[0] * grid[1] != count or grid[0] < self.cell[0] or grid[1] < self.cell[1]:
            return None
        if self.generator is None:
            self.generator = torch.Generator()
            self.generator.set_state(torch.get_rng_state())
        generator = self.generator if self.use_rand and tokens.shape[0] % 2 == 0 else None
        return token_merging(tokens, grid, self.cell, merged, int(count * self.agent_ratio), generator)


class AgentProcessor:
    """Self-attention of one block: merge, attend through agents, take apart. Everything else is the former one's."""

    def __init__(self, settings: AgentSD, former: Any) -> None:
        self.settings = settings
        self.former = former
        self.tokens: Tensor | None = None

    def see_tokens(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tokens are compared as they enter the block, before its norm."""
        self.tokens = args[0] if args else kwargs["hidden_states"]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        tokens, self.tokens = self.tokens, None
        merging = None
        if tokens is not None and encoder_hidden_states is None and attention_mask is None:
            merging = self.settings.merging(tokens)
        if merging is None:
            return self.former(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        x = merging.merge(hidden_states, merging.tokens)
        q, k, v = (_heads(project(x), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        if merging.agents is None:
            out = self._attend(q, k, v, attn.scale)
        else:
            agents = _heads(attn.to_q(merging.merge(hidden_states, merging.agents)), attn.heads)
            collected = self._attend(agents, k, v, attn.scale)
            out = self._attend(q, agents, collected, attn.scale**self.settings.scale_exponent)
            out = out + self.settings.shortcut * v
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return merging.unmerge(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.settings.upcast:
            return attention(q.float(), k.float(), v.float(), scale=scale)[0].to(v.dtype)
        return attention(q, k, v, scale=scale)[0]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Merge:
    """Sources that stay (B, U), that go (B, R), and the destination of each that goes (B, R)."""

    staying: Tensor
    going: Tensor
    target: Tensor


@dataclass(frozen=True)
class TokenMerging:
    """How the tokens of an image are merged: positions of sources and destinations, and which source goes where."""

    sources: Tensor
    destinations: Tensor
    tokens: Merge
    agents: Merge | None

    def merge(self, x: Tensor, into: Merge) -> Tensor:
        """Tokens (B, N, C) → (B, N − R, C): sources that stay, then destinations as means of all they took in."""
        sources, destinations = x[:, self.sources], x[:, self.destinations]
        channels = x.shape[2]
        going = sources.gather(1, into.going.unsqueeze(2).expand(-1, -1, channels))
        target = into.target.unsqueeze(2).expand(-1, -1, channels)
        means = destinations.scatter_reduce(1, target, going, "mean")
        return torch.cat([sources.gather(1, into.staying.unsqueeze(2).expand(-1, -1, channels)), means], 1)

    def unmerge(self, x: Tensor) -> Tensor:
        """The inverse in shape: every token that was merged gets what its destination has."""
        staying, means = x.split([self.tokens.staying.shape[1], len(self.destinations)], 1)
        out = x.new_empty(x.shape[0], len(self.sources) + len(self.destinations), x.shape[2])
        out[:, self.destinations] = means
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        out[batch, self.sources[self.tokens.staying]] = staying
        out[batch, self.sources[self.tokens.going]] = means[batch, self.tokens.target]
        return out


@torch.no_grad()
def token_merging(
    tokens: Tensor,
    grid: tuple[int, int],
    cell: tuple[int, int],
    merged: int,
    merged_for_agents: int,
    generator: torch.Generator | None,
) -> TokenMerging:
    """Find the destination most similar to each source (cosine), and let the most similar sources go.

    Args:
        tokens: (B, Y·X, C) of a row-major map.
        merged, merged_for_agents: how many sources go, at most all.
        generator: draws the destination of each cell; None takes the first token.
    """
    rows, columns = grid[0] // cell[0], grid[1] // cell[1]
    device = tokens.device
    if generator is None:
        pick = torch.zeros(rows, columns, dtype=torch.long, device=device)
    else:
        pick = torch.randint(cell[0] * cell[1], (rows, columns), generator=generator).to(device)
    row = cell[0] * torch.arange(rows, device=device)[:, None] + pick // cell[1]
    column = cell[1] * torch.arange(columns, device=device) + pick % cell[1]
    destinations = (row * grid[1] + column).flatten()
    is_source = torch.ones(tokens.shape[1], dtype=torch.bool, device=device)
    is_source[destinations] = False
    sources = is_source.nonzero().flatten()

    unit = tokens / tokens.norm(dim=2, keepdim=True)
    best, target = (unit[:, sources] @ unit[:, destinations].mT).max(2)
    order = best.argsort(dim=1, descending=True)

    def first(count: int) -> Merge:
        return Merge(order[:, count:], order[:, :count], target.gather(1, order[:, :count]))

    merged, merged_for_agents = min(merged, len(sources)), min(merged_for_agents, len(sources))
    useful = 2 * (tokens.shape[1] - merged_for_agents) < tokens.shape[1] - merged
    return TokenMerging(sources, destinations, first(merged), first(merged_for_agents) if useful else None)
