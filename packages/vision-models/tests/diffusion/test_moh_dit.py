"""MoH-DiT against a plain network, its loss against the definition, and diffusers' ways to keep and to use it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

from attn_core.nn import HeadRouter, balance_losses  # noqa: E402
from attn_core.weights import official_names  # noqa: E402
from vision_models.diffusion.denoising_loss import Denoising, sampled  # noqa: E402
from vision_models.diffusion.moh_dit import KEY_MAP, VARIANTS, MoHDiT, create_transformer, load_official  # noqa: E402
from vision_models.tasks.denoising import DenoisingTask, NoiseError  # noqa: E402

PARAMETERS = {
    "moh_dit_s_2_75": 32_998_688,
    "moh_dit_s_2_90": 32_997_152,
    "moh_dit_b_2_75": 130_638_368,
    "moh_dit_b_2_90": 130_638_368,
}
SHARE = {"75": 0.75, "90": 0.9}
SMALL: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 6, "hidden_size": 20, "num_layers": 3, "num_heads": 4,
    "num_classes": 5,
}  # fmt: skip
NETS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "mixture": {**SMALL, "shared_heads": 1, "routed_heads": 2},
    "heads of their own": {**SMALL, "num_heads": (3, 4, 6), "head_dim": 3, "shared_heads": (3, 2, 0),
                           "routed_heads": (0, 1, 4)},
}  # fmt: skip


class Plain:
    """The network as its official names spell it, one head after another."""

    def __init__(self, state: dict[str, Tensor], options: dict[str, Any]) -> None:
        self.state, self.options = state, options
        self.balance: list[Tensor] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].flatten(1).T + self.state[f"{name}.bias"]

    def of_block(self, name: str, number: int) -> int:
        value = self.options[name]
        return value if isinstance(value, int) else value[number]

    def gates(self, x: Tensor, name: str, shared: int, routed: int) -> Tensor:
        def scores(layer: str) -> Tensor:
            return (x @ self.state[f"{name}.{layer}.weight"].T).softmax(-1)

        parts = []
        if shared:
            parts.append(shared * scores("wg_1") if shared > 1 else torch.ones_like(x[..., :1]))
        if routed:
            p = scores("wg")
            chosen = (p >= p.sort(-1).values[..., -routed, None]).to(p.dtype)
            parts.append(routed * p * chosen / (p * chosen).sum(-1, keepdim=True))
            self.balance.append(p.shape[-1] * (p.mean((0, 1)) * chosen.mean((0, 1))).sum())
        if shared and routed:
            weights = 2 * scores("wg_0")
            parts = [parts[0] * weights[..., :1], parts[1] * weights[..., 1:]]
        return torch.cat(parts, -1)

    def attention(self, x: Tensor, number: int) -> Tensor:
        name, heads = f"blocks.{number}.attn", self.of_block("num_heads", number)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in self.linear(x, f"{name}.qkv").chunk(3, -1))
        out = ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)
        if "shared_heads" in self.options:
            numbers = (self.of_block(which, number) for which in ("shared_heads", "routed_heads"))
            out = out * self.gates(x, name, *numbers)[..., None]
        return self.linear(out.flatten(2), f"{name}.proj")

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale[:, None]) + shift[:, None]

    def __call__(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        x = self.linear(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3), "x_embedder.proj")
        place = torch.zeros(rows, columns, 20, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                for m in range(5):
                    speed = 10000 ** (-m / 5)
                    for start, at in ((0, j), (10, i)):
                        place[i, j, start + m], place[i, j, start + 5 + m] = math.sin(at * speed), math.cos(at * speed)
        place = place.float().double() if (rows, columns) == (4, 4) else place  # the table that is kept
        x = (x + place).flatten(1, 2)
        angle = time[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        hidden = F.silu(self.linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0"))
        condition = self.linear(hidden, "t_embedder.mlp.2") + self.state["y_embedder.embedding_table.weight"][label]
        for i in range(3):
            parts = self.linear(F.silu(condition), f"blocks.{i}.adaLN_modulation.1").chunk(6, 1)
            x = x + parts[2][:, None] * self.attention(self.modulated(x, *parts[:2]), i)
            hidden = self.linear(self.modulated(x, *parts[3:5]), f"blocks.{i}.mlp.fc1")
            hidden = 0.5 * hidden * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
            x = x + parts[5][:, None] * self.linear(hidden, f"blocks.{i}.mlp.fc2")
        x = self.modulated(x, *self.linear(F.silu(condition), "final_layer.adaLN_modulation.1").chunk(2, 1))
        x = self.linear(x, "final_layer.linear").unflatten(1, (rows, columns)).unflatten(3, (2, 2, 6))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _drawn(options: dict[str, Any]) -> Any:
    model: Any = MoHDiT(**options).double()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_models(name: str) -> None:
    with torch.device("meta"):
        model = create_transformer(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("moh")])
def test_shares_of_heads_are_those_of_the_names(name: str) -> None:
    options = {"num_layers": 28, **VARIANTS[name]}
    every = options["num_heads"] if isinstance(options["num_heads"], list) else [options["num_heads"]] * 12
    taken = [s + r for s, r in zip(options["shared_heads"], options["routed_heads"], strict=True)]
    share = sum(taken) / sum(every)
    assert len(taken) == options["num_layers"]
    assert share == pytest.approx(SHARE[name[-2:]], abs=0.03)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=str)
def test_output_balance_and_gradients_equal_a_plain_network(name: str, size: tuple[int, int]) -> None:
    model = _drawn(NETS[name])
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x, time, label = torch.randn(2, 3, *size, dtype=torch.float64), torch.tensor([3, 700]), torch.tensor([4, 5])
    results: list[list[Tensor]] = []
    for plain in (False, True):
        noisy = x.clone().requires_grad_()
        if plain:
            names = official_names(model, KEY_MAP["moh"])
            net = Plain({n: own[ours] for n, ours in names.items() if ours in own}, NETS[name])
            out, balance = net(noisy, time, label), net.balance
        else:
            with balance_losses(model) as balance:
                out = model(noisy, time, label).sample
        loss = out.square().mean() + (torch.stack(balance).mean() if balance else 0)
        results.append([out.detach(), *torch.autograd.grad(loss, [noisy, *own.values()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_official_checkpoints_make_the_round_trip() -> None:
    model, other = _drawn(NETS["mixture"]), _drawn(NETS["mixture"])
    model_state = model.state_dict()
    state = {n: model_state[ours] for n, ours in official_names(model, KEY_MAP["moh"]).items()}
    assert {"blocks.2.attn.wg_0.weight", "x_embedder.proj.bias", "pos_embed", "final_layer.linear.weight"} <= set(state)
    load_official(other, {"ema": state, "model": {}}, ema=True)
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


def test_diffusers_keeps_it_and_its_pipeline_uses_it(tmp_path: Path) -> None:
    model = MoHDiT(**{**NETS["mixture"], "num_classes": 1000}).eval()
    for parameter in model.final_layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = MoHDiT.from_pretrained(tmp_path)
    x, time, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([4, 5])
    torch.testing.assert_close(again(x, time, label, return_dict=False)[0], model(x, time, label).sample)
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.DiTPipeline(transformer=again, vae=_Picture(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([7, 8], num_inference_steps=2, output_type="np").images
    assert made.shape == (2, 8, 8, 3)


class _Picture(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In place of an autoencoder: latents are pictures."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:  # noqa: ARG002  the pipeline reads it
        super().__init__()
        self.register_buffer("here", torch.zeros(()))  # tells the pipeline which device it is on

    def decode(self, latents: Tensor) -> Any:
        return diffusers.models.autoencoders.vae.DecoderOutput(sample=latents)


def test_the_loss_is_the_definition_for_one_pixel_at_every_time() -> None:
    """Eq. 5, 10 and 15 in plain numbers; the bound does not move the mean."""
    steps = 10
    denoising = Denoising(steps)
    beta = [1e-2 + i * (0.999 - 1e-2) / 9 for i in range(steps)]  # a hundred times the schedule of 1,000 steps, cut
    assert denoising.betas.tolist() == pytest.approx(beta)
    kept = [math.prod(1 - b for b in beta[: i + 1]) for i in range(steps)]
    x = torch.tensor([-1.0, 0.3, 1.0, -0.2, 0.9, 0.1, 0.5, -0.7, 0.2, 0.4], dtype=torch.float64)
    noise, predicted, share = torch.randn(3, steps, dtype=torch.float64)
    output = torch.stack([predicted, share], 1).view(steps, 2, 1, 1).requires_grad_()
    time, pixel = torch.arange(steps), x.view(-1, 1, 1, 1)
    terms = denoising.loss(output, pixel, time, noise.view(-1, 1, 1, 1))
    noisy = denoising.noisy(pixel, time, noise.view(-1, 1, 1, 1)).flatten().tolist()
    for t in range(steps):
        assert noisy[t] == pytest.approx(kept[t] ** 0.5 * x[t].item() + (1 - kept[t]) ** 0.5 * noise[t].item())
        assert terms["mse"][t].item() == pytest.approx((noise[t] - predicted[t]).item() ** 2)
        before = kept[t - 1] if t else 1.0
        variance = [b * (1 - (kept[i - 1] if i else 1.0)) / (1 - kept[i]) for i, b in enumerate(beta)]
        least = math.log(variance[max(t, 1)])
        part = (share[t].item() + 1) / 2
        spread = part * math.log(beta[t]) + (1 - part) * least

        def mean(clean: float, t: int = t, before: float = before) -> float:
            return (before**0.5 * beta[t] * clean + (1 - beta[t]) ** 0.5 * (1 - before) * noisy[t]) / (1 - kept[t])

        clean = (noisy[t] - (1 - kept[t]) ** 0.5 * predicted[t].item()) / kept[t] ** 0.5
        if t == 0:
            edge = (x[0].item() + 1 / 255 - mean(clean)) / math.exp(spread / 2)
            bits = -math.log(max(0.5 * (1 + math.tanh((2 / math.pi) ** 0.5 * (edge + 0.044715 * edge**3))), 1e-12))
        else:
            apart = (mean(x[t].item()) - mean(clean)) ** 2 / math.exp(spread)
            bits = 0.5 * (spread - least + math.exp(least - spread) + apart - 1)
        assert terms["bound"][t].item() == pytest.approx(bits / math.log(2), rel=1e-9)
    (grad,) = torch.autograd.grad(terms["bound"].sum(), output)
    assert not grad[:, 0].any()
    assert grad[:, 1].any()


def test_noise_and_steps_back_are_those_of_the_scheduler_that_samples() -> None:
    scheduler = diffusers.DDPMScheduler(1000, variance_type="learned_range")
    denoising = Denoising()
    x, noise, time = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 400, 999])
    torch.testing.assert_close(
        denoising.noisy(x, time, noise), scheduler.add_noise(x, noise, time), rtol=1e-4, atol=1e-5
    )


def test_a_network_that_knows_the_picture_samples_it() -> None:
    picture = torch.tensor([[[[0.5, -0.5], [0.25, -1.0]]]])
    denoising = Denoising()
    kept = (1 - denoising.betas).cumprod(0).float()

    class Knows:
        config = type("Config", (), {"out_channels": 1, "num_classes": 3})

        def __call__(self, x: Tensor, time: Tensor, label: Tensor) -> Any:
            here = kept[time].view(-1, 1, 1, 1)
            target = torch.where((label == 1).view(-1, 1, 1, 1), picture, 0.0)
            noise = (x - here.sqrt() * target) / (1 - here).sqrt()
            return type("Output", (), {"sample": noise})

    found = sampled(Knows(), torch.tensor([1, 0]), (1, 2, 2), steps=20)
    torch.testing.assert_close(found, torch.cat([picture, 0 * picture]), rtol=0, atol=1e-2)
    guided = sampled(Knows(), torch.tensor([1]), (1, 2, 2), steps=20, guidance=1.5)
    torch.testing.assert_close(guided, (1.5 * picture).clamp(-1, 1), rtol=0, atol=2e-2)


def test_the_task_trains_tests_and_samples() -> None:
    net = MoHDiT(**{**NETS["mixture"], "in_channels": 1, "out_channels": 2})
    task = DenoisingTask(net, sample_steps=2)
    batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.arange(4)}
    losses = task(mode="loss", **batch)
    assert set(losses) == {"loss_noise", "loss_bound", "loss_balance"}
    sum(losses.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for n, p in net.named_parameters() if n != "pos_embed")
    task.eval()
    first, second = (task(mode="predict", **batch) for _ in range(2))
    assert first == second
    metric = NoiseError()
    metric.process(None, first)
    assert metric.compute_metrics(metric.results)["noise_error"] == pytest.approx(1, abs=0.3)  # it says 0 at the start
    assert task.samples(torch.tensor([0, 1, 2])).shape == (3, 1, 8, 8)
    assert sum(isinstance(m, HeadRouter) for m in net.modules()) == 3


def test_labels_are_left_out_in_training_alone() -> None:
    model = MoHDiT(**{**SMALL, "class_dropout": 1.0})
    label = torch.tensor([0, 3])
    none = model.y_embedder.embedding_table.weight[5].expand(2, -1)
    torch.testing.assert_close(model.train().y_embedder(label), none)
    torch.testing.assert_close(model.eval().y_embedder(label), model.y_embedder.embedding_table.weight[label])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (4, 4)}, r"MoHDiT: num_heads must be one number or 3, got \(4, 4\)"),
        ({"hidden_size": 22}, "MoHDiT: hidden_size must be a multiple of 4, got hidden_size=22"),
        ({"num_heads": 3}, "MoHDiT: num_heads must divide hidden_size 20, or give head_dim, got 3"),
        ({"patch_size": 3}, "MoHDiT: patch_size must divide sample_size 8, got patch_size=3"),
        ({"head_dim": 5}, "MoHDiT: head_dim belongs to shared_heads and routed_heads, got head_dim=5"),
        ({"shared_heads": 2}, "MoHDiT: shared_heads and routed_heads go together, got 2 and None"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoHDiT(**{**SMALL, **options})


def test_wrong_names_and_latents_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown transformer 'moh_dit_s_2_57'; did you mean 'moh_dit_s_2_75'\?"):
        create_transformer("moh_dit_s_2_57")
    with pytest.raises(ValueError, match=r"hidden_states must be \(B, 3, Y, X\) with Y and X multiples of 2, got"):
        MoHDiT(**SMALL)(torch.zeros(1, 3, 8, 7), torch.zeros(1), torch.zeros(1, dtype=torch.long))
