"""Training of a diffusion transformer on labeled pictures."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attn_core.engine import Metric, TaskModel, build
from attn_core.nn import balance_losses
from vision_models.diffusion.denoising_loss import Denoising, sampled

TIMES = 8  # strengths of noise at which a picture is tested


class DenoisingTask(TaskModel):
    """Noise of a random strength, which the network has to find; routers are asked to choose heads equally often.

    Args:
        net: :class:`vision_models.diffusion.moh_dit.MoHDiT`, or its recipe.
        balance: Weight of the routers' balance.
        sample_steps, guidance: Of the pictures that are made at the end of a run.
    """

    def __init__(
        self, net: nn.Module | dict[str, Any], *, balance: float = 0.01, sample_steps: int = 100, guidance: float = 2.0
    ) -> None:
        super().__init__()
        self.net: Any = build(net)
        self.balance, self.sample_steps, self.guidance = balance, sample_steps, guidance
        self.denoising = Denoising()

    def loss(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **_: Any) -> dict[str, Tensor]:
        """``loss_noise``, with a learned variance ``loss_bound``, and with routers ``loss_balance``."""
        time = torch.randint(self.denoising.steps, (len(image),), device=image.device)
        noise = torch.randn_like(image)
        with balance_losses(self.net) as found:
            output = self.net(self.denoising.noisy(image, time, noise), time, label).sample
        terms = self.denoising.loss(output.float(), image.float(), time, noise.float())
        losses = {f"loss_{'noise' if name == 'mse' else name}": term.mean() for name, term in terms.items()}
        return {**losses, "loss_balance": self.balance * torch.stack(found).mean()} if found else losses

    def predict(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **_: Any) -> list[dict[str, Any]]:
        """Per sample ``{"error": mean squared error of the noise}`` at strengths and noise that are always the same."""
        generator = torch.Generator().manual_seed(0)
        errors = torch.zeros(len(image), device=image.device)
        for part in range(TIMES):
            time = torch.full_like(label, (2 * part + 1) * self.denoising.steps // (2 * TIMES))
            noise = torch.randn(image.shape[1:], generator=generator).to(image).expand_as(image)
            output = self.net(self.denoising.noisy(image, time, noise), time, label).sample
            errors += self.denoising.loss(output[:, : image.shape[1]].float(), image, time, noise)["mse"] / TIMES
        return [{"error": error} for error in errors.tolist()]

    def samples(self, label: Int[Tensor, " B"]) -> Tensor:
        """Pictures (B, C, Y, X) in [−1, 1] of the classes ``label``."""
        config = self.net.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        return sampled(self.net, label, shape, steps=self.sample_steps, guidance=self.guidance)


class NoiseError(Metric):
    """Mean squared error of the predicted noise, which has variance 1."""

    def process(self, data_batch: Any, data_samples: Any) -> None:  # noqa: ARG002  mmengine's signature
        """Keep the errors of a batch."""
        self.results += [sample["error"] for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        """``{"noise_error": …}``."""
        return {"noise_error": sum(results) / max(1, len(results))}
