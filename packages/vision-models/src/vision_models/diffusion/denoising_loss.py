"""The loss of DiT: squared error of the predicted noise, and the bound on the likelihood for the variance of a step.

Papers: Ho et al., DDPM, 2020, arXiv 2006.11239; Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672, eq. 15 and
16. Official code: SkyworkAI/MoH, ``MoH-DiT/diffusion/gaussian_diffusion.py``. The schedule is that of diffusers'
``DDPMScheduler(variance_type="learned_range")``, which samples from what is trained here.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-12
HALF_LEVEL = 1 / 255  # of 8-bit pictures in [−1, 1]


class Denoising(nn.Module):
    """Noise of ``steps`` strengths, the variance growing linearly, and the loss of a network that predicts it.

    Args:
        steps: strengths; of any number, they end with almost nothing but noise.
    """

    betas: Tensor

    def __init__(self, steps: int = 1000) -> None:
        super().__init__()
        self.steps = steps
        scale = 1000 / steps
        betas = torch.linspace(scale * 1e-4, min(scale * 0.02, 0.999), steps, dtype=torch.float64)
        self.register_buffer("betas", betas, persistent=False)

    def noisy(self, x: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Pictures (B, C, Y, X) with the noise of their time (B,)."""
        kept = self._at((1 - self.betas).cumprod(0), time, x)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def loss(self, output: Tensor, x: Tensor, time: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """``mse`` of the noise, and for a learned variance ``bound`` in bits a pixel: each (B,).

        Args:
            output: of the network, (B, C, Y, X), or (B, 2·C, Y, X) with shares of the way from the least to the most
                log-variance of a step back, −1 to 1.
        """
        channels = x.shape[1]
        predicted = output[:, :channels]
        losses = {"mse": (noise - predicted).square().mean((1, 2, 3))}
        if output.shape[1] == channels:
            return losses
        kept = (1 - self.betas).cumprod(0)
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        variance = self.betas * (1 - before) / (1 - kept)
        least = torch.cat([variance[1:2], variance[1:]]).log()  # that of the last step back would be −∞
        share = (output[:, channels:] + 1) / 2
        log_variance = share * self._at(self.betas.log(), time, x) + (1 - share) * self._at(least, time, x)
        of_clean = self._at(self.betas * before.sqrt() / (1 - kept), time, x)
        of_noisy = self._at((1 - before) * (1 - self.betas).sqrt() / (1 - kept), time, x)
        here = self._at(kept, time, x)
        # How far the clean picture that the noise stands for is from the true one, without their cancelling sums.
        astray = ((1 - here) / here).sqrt() * (noise - predicted.detach())
        mean = of_clean * (x + astray) + of_noisy * self.noisy(x, time, noise)
        true_log = self._at(least, time, x)
        apart = (of_clean * astray).square() * (-log_variance).exp()
        divergence = 0.5 * (log_variance - true_log + (true_log - log_variance).exp() + apart - 1)
        bits = torch.where((time == 0).view(-1, 1, 1, 1), -_log_probability(x, mean, 0.5 * log_variance), divergence)
        return {**losses, "bound": bits.mean((1, 2, 3)) / math.log(2)}

    @staticmethod
    def _at(values: Tensor, time: Tensor, like: Tensor) -> Tensor:
        """Those of each picture's time, (B, 1, 1, 1)."""
        return values[time].to(like.dtype).view(-1, 1, 1, 1)


def _log_probability(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of the 8-bit level that holds ``x``, by the normal distribution; the outer levels reach to infinity."""

    def below(edge: Tensor) -> Tensor:
        z = (edge - mean) * (-log_scale).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    lower, upper = below(x - HALF_LEVEL), below(x + HALF_LEVEL)
    inner = (upper - lower).clamp(min=TINY).log()
    outer = torch.where(x < -0.999, upper.clamp(min=TINY).log(), (1 - lower).clamp(min=TINY).log())
    return torch.where(x.abs() > 0.999, outer, inner)


def sampled(net: Any, labels: Tensor, shape: tuple[int, int, int], *, steps: int, guidance: float = 1.0) -> Tensor:
    """Pictures (B, C, Y, X) of the classes ``labels`` (B,), by ``steps`` of diffusers' DDPM.

    Args:
        net: as :class:`vision_models.diffusion.moh_dit.MoHDiT`, in eval mode.
        guidance: how far to go beyond what the class alone says; 1: not.
    """
    from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

    learned = net.config.out_channels == 2 * shape[0]
    scheduler: Any = DDPMScheduler(1000, variance_type="learned_range" if learned else "fixed_small", clip_sample=True)
    scheduler.set_timesteps(steps)
    x = torch.randn(len(labels), *shape, device=labels.device)
    nothing = torch.full_like(labels, net.config.num_classes)
    with torch.no_grad():
        for time in scheduler.timesteps:
            output = net(x, time.expand(len(x)), labels).sample
            if guidance != 1:
                other = net(x, time.expand(len(x)), nothing).sample[:, : shape[0]]
                guided = other + guidance * (output[:, : shape[0]] - other)
                output = torch.cat([guided, output[:, shape[0] :]], 1)
            x = scheduler.step(output, time, x).prev_sample
    return x
