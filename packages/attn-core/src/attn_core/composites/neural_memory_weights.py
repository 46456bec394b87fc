"""Titans' neural memory of one linear layer: weights after every chunk, from gradients at the segment's start."""

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import check_dtype, check_rank, check_same, check_size, check_tensor
from attn_core.ops.linear_scan import linear_scan

OPERATOR = "neural_memory_weights"


def neural_memory_weights(
    keys: Float[Tensor, "B H N D"],
    values: Float[Tensor, "B H N Dv"],
    rate: Float[Tensor, "B H N"],
    forget: Float[Tensor, "B H T"],
    weight: Float[Tensor, "B H D Dv"],
    *,
    momentum: Float[Tensor, "B H T"] | None = None,
    last_weight: Float[Tensor, "B H D Dv"] | None = None,
    last_surprise: Float[Tensor, "B H D Dv"] | None = None,
) -> tuple[Float[Tensor, "B H T+1 D Dv"], Float[Tensor, "B H D Dv"]]:
    """Weights of the memory W: D → Dv after each of T chunks of N/T tokens, by gradient descent with decay.

    Loss of a chunk: Σ_t rate_t·mean((k_t W − v_t)²), at W = ``weight`` for every chunk of the segment, so all gradients
    are one batched product G_c = 2/Dv·K_cᵀ diag(rate)(K_c W − V_c). Then S_c = momentum_c·S_{c−1} − G_c (or −G_c
    without momentum) and W_c = (1 − forget_c)·W_{c−1} + S_c, two scans. Gradients of single tokens are never formed;
    the memory is that of T weights.

    Args:
        keys, values: data in one dtype; N must be a multiple of T.
        rate, forget, momentum: in float32 (float64 beside float64), as the weights.
        weight: where the gradients are taken; also W_0 unless ``last_weight`` is given.
        last_weight, last_surprise: W and S behind the previous segment. S_0 is zero by default.

    Returns:
        W_0 … W_T: chunk c reads W_c, the next segment starts from W_T; and S_T. In the dtype of ``weight``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Behrouz et al. 2024 (arXiv 2501.00663), eqs. 10, 13 and 17; lucidrains/titans-pytorch,
    ``NeuralMemory.store_memories``.
    """
    check_rank(OPERATOR, "keys", keys, "B H N D")
    for name, tensor in (("values", values), ("rate", rate), ("forget", forget), ("weight", weight)):
        check_tensor(OPERATOR, name, tensor)
    batch, heads, tokens, width = keys.shape
    sizes = {"B": batch, "H": heads, "N": tokens, "D": width, "Dv": values.shape[-1], "T": forget.shape[-1]}
    layouts = {"values": "B H N Dv", "rate": "B H N", "forget": "B H T", "weight": "B H D Dv", "momentum": "B H T"}
    layouts |= {"last_weight": "B H D Dv", "last_surprise": "B H D Dv"}
    given = (values, rate, forget, weight, momentum, last_weight, last_surprise)
    exact = torch.float64 if keys.dtype == torch.float64 else torch.float32
    for (name, layout), tensor in zip(layouts.items(), given, strict=True):
        if tensor is None:
            continue
        check_same(OPERATOR, keys, {name: tensor}, dtype=name == "values", first_name="keys")
        check_rank(OPERATOR, name, tensor, layout)
        for dim, letter in enumerate(layout.split()):
            check_size(OPERATOR, name, tensor, dim, sizes[letter], f"{letter} of {layout}")
        if name != "values":
            check_dtype(OPERATOR, name, tensor, (exact,))
    chunks = forget.shape[-1]
    if chunks == 0 or tokens % chunks:
        raise ValueError(
            f"{OPERATOR}: the tokens of keys must be a multiple of the chunks of forget, got {tokens} and {chunks}"
        )

    def flat(x: Tensor) -> Tensor:
        """Heads as images; T chunks where x has tokens."""
        return x.to(exact).flatten(0, 1)

    K, V = (flat(x).unflatten(1, (chunks, tokens // chunks)) for x in (keys, values))
    start = flat(weight)
    residual = (torch.matmul(K, start.unsqueeze(1)) - V) * flat(rate).unflatten(1, (chunks, -1)).unsqueeze(-1)
    surprise = torch.matmul(K.mT, residual) * (-2 / values.shape[-1])
    if momentum is not None:
        surprise = linear_scan(flat(momentum), surprise, None if last_surprise is None else flat(last_surprise))
    first = start if last_weight is None else flat(last_weight)
    updated = linear_scan(1 - flat(forget), surprise, first)
    weights = torch.cat([first.unsqueeze(1), updated], dim=1)
    return weights.unflatten(0, (batch, heads)), surprise[:, -1].unflatten(0, (batch, heads))
