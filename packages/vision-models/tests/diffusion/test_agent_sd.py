"""AgentSD in a small UNet against a formulation with loops."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision_models.diffusion.agent_sd import AgentSD, token_merging

diffusers = pytest.importorskip("diffusers")
SIDE, TEXT = 8, 5


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return (
        diffusers.UNet2DConditionModel(
            sample_size=SIDE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            attention_head_dim=2,
        )
        .double()
        .eval()
    )


def run(unet: Any, batch: int = 2, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, *size, dtype=torch.float64, generator=generator)
    text = torch.randn(batch, 3, TEXT, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        return unet(latent, 10, encoder_hidden_states=text).sample


def _blocks(unet: nn.Module) -> list[Any]:
    return [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]


def plain_merge(x: Tensor, like: Tensor, columns: int, cell: tuple[int, int], pick: Tensor, count: int) -> Any:
    """Merged tokens of one image (N, C), and which of them stands for each token."""
    destinations = []
    for r, c in torch.cartesian_prod(torch.arange(pick.shape[0]), torch.arange(pick.shape[1])).tolist():
        y, x0 = cell[0] * r + int(pick[r, c]) // cell[1], cell[1] * c + int(pick[r, c]) % cell[1]
        destinations.append(y * columns + x0)
    sources = [i for i in range(len(x)) if i not in destinations]
    similar = {i: [float(torch.cosine_similarity(like[i], like[j], 0)) for j in destinations] for i in sources}
    going = sorted(sources, key=lambda i: -max(similar[i]))[:count]
    goal = {i: destinations[similar[i].index(max(similar[i]))] for i in going}
    groups = [[i] for i in sources if i not in going]
    groups += [[j, *(i for i in going if goal[i] == j)] for j in destinations]
    place = {i: g for g, group in enumerate(groups) for i in group}
    return torch.stack([x[group].mean(0) for group in groups]), [place[i] for i in range(len(x))]


def plain_attention(attn: Any, x: Tensor, agents: Tensor | None, exponent: float, shortcut: float) -> Tensor:
    heads = attn.heads
    q, k, v = (layer(x).unflatten(1, (heads, -1)).transpose(0, 1) for layer in (attn.to_q, attn.to_k, attn.to_v))
    scale = q.shape[2] ** -0.5
    if agents is None:
        out = (scale * q @ k.mT).softmax(-1) @ v
    else:
        a = attn.to_q(agents).unflatten(1, (heads, -1)).transpose(0, 1)
        collected = (scale * a @ k.mT).softmax(-1) @ v
        out = (scale**exponent * q @ a.mT).softmax(-1) @ collected + shortcut * v
    return attn.to_out[0](out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.2, "agent_ratio": 0.9, "cell": (4, 4), "scale_exponent": 0.5, "shortcut": 0.2},
        {"ratio": 0.6, "agent_ratio": 0.5},  # too many agents: merged tokens attend to each other
        {"use_rand": False, "upcast": True},
        {"ratio": 0.7, "agent_ratio": 0.75, "cell": (2, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_self_attention_equals_the_loops(unet: Any, options: dict[str, Any], batch: int) -> None:
    seen: dict[str, Any] = {}
    block = _blocks(unet)[0]
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        block.attn1.register_forward_hook(lambda _, args, out: seen.update(normed=args[0], out=out)),
    ]
    sd = AgentSD(unet, generator=torch.Generator().manual_seed(3), **options)
    with sd:
        run(unet, batch)
    for handle in handles:
        handle.remove()
    cell = sd.cell
    shape = (SIDE // cell[0], SIDE // cell[1])
    pick = torch.zeros(shape, dtype=torch.long)
    if batch == 2 and sd.use_rand:
        pick = torch.randint(cell[0] * cell[1], shape, generator=torch.Generator().manual_seed(3))
    tokens = SIDE * SIDE
    for b in range(batch):
        merging: dict[str, Any] = {"like": seen["x"][b], "columns": SIDE, "cell": cell, "pick": pick}
        merged, place = plain_merge(seen["normed"][b], count=int(tokens * sd.ratio), **merging)
        agents, _ = plain_merge(seen["normed"][b], count=int(tokens * sd.agent_ratio), **merging)
        if 2 * len(agents) >= len(merged):
            agents = None
        out = plain_attention(block.attn1, merged, agents, sd.scale_exponent, sd.shortcut)[place]
        tolerance = 1e-5 if sd.upcast else 1e-10
        torch.testing.assert_close(seen["out"][b], out, rtol=tolerance, atol=tolerance)


def test_removed_or_without_ratio_it_changes_no_bit(unet: Any) -> None:
    before, processors = run(unet), [block.attn1.processor for block in _blocks(unet)]
    with AgentSD(unet, ratio=0.0):
        assert torch.equal(run(unet), before)
    with AgentSD(unet):
        assert not torch.allclose(run(unet), before)
    assert torch.equal(run(unet), before)
    assert [block.attn1.processor for block in _blocks(unet)] == processors
    assert not any(block._forward_pre_hooks for block in _blocks(unet))


def test_settings_may_change_between_steps_and_pipelines_are_taken(unet: Any) -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.unet = unet

    with AgentSD(Pipeline(), use_rand=False) as sd:
        first = run(unet)
        sd.ratio, sd.agent_ratio = 0.3, 0.5
        assert not torch.allclose(run(unet), first)
        sd.ratio, sd.agent_ratio = 0.4, 0.8
        assert torch.equal(run(unet), first)


def test_torchs_generator_is_left_as_it_was(unet: Any) -> None:
    state = torch.get_rng_state()
    with AgentSD(unet):
        run(unet)
    assert torch.equal(torch.get_rng_state(), state)


def test_smaller_maps_keep_their_attention(unet: Any) -> None:
    sd = AgentSD(unet)
    sd.latent = (16, 16)
    assert sd.merging(torch.randn(2, 64, 4)) is None
    sd.max_downsample = 2
    assert sd.merging(torch.randn(2, 64, 4)) is not None


def test_any_latent_size_works(unet: Any) -> None:
    with AgentSD(unet, cell=(3, 2)):
        assert torch.isfinite(run(unet, 2, (10, 14))).all()


def test_unmerging_returns_every_token_to_its_place() -> None:
    x = torch.randn(2, 30, 4)
    merging = token_merging(x, (5, 6), (2, 2), 10, 25, torch.Generator().manual_seed(0))
    merged = merging.merge(x, merging.tokens)
    assert merged.shape == (2, 20, 4)
    back = merging.unmerge(merged)
    kept = [int(i) for i in merging.sources[merging.tokens.staying[0]]]
    assert torch.equal(back[0, kept], x[0, kept])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got ratio=1.0"),
        ({"agent_ratio": -0.1}, r"agent_ratio must lie in \[0, 1\), got agent_ratio=-0.1"),
        ({"cell": (0, 2)}, r"cell must be two positive numbers, got cell=\(0, 2\)"),
        ({"max_downsample": 0}, "max_downsample must be at least 1, got max_downsample=0"),
    ],
)
def test_wrong_settings_are_named(unet: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AgentSD: {message}"):
        AgentSD(unet, **options)


def test_models_that_do_not_fit_are_named(unet: Any) -> None:
    with pytest.raises(ValueError, match="AgentSD: Linear has no BasicTransformerBlock"):
        AgentSD(nn.Linear(2, 2)).apply()
    with AgentSD(unet), pytest.raises(ValueError, match="agent attention already; remove"):
        AgentSD(unet).apply()
