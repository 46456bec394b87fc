"""Pointer Networks: parameters, the score's formula, teacher forcing, padding, beam search, constraints, errors."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models import PointerNetwork, create_model
from seq_models.models.pointer_network import Constraint
from seq_models.pointing.task import PointingTask

KINDS: list[dict[str, Any]] = [
    {},
    {"glimpses": 2, "tanh_clip": 10.0},
    {"encoder": "transformer", "encoder_layers": 1, "encoder_heads": 2},
]


@pytest.fixture(params=KINDS, ids=str)
def network(request: pytest.FixtureRequest) -> PointerNetwork:
    torch.manual_seed(0)
    return PointerNetwork(8, init_range=0.8, **request.param).double()


def test_parameters_are_those_of_the_paper_s_sizes() -> None:
    assert sum(p.numel() for p in create_model("pointer_network_256").parameters()) == 664_068
    assert sum(p.numel() for p in PointerNetwork(128).parameters()) == 168_196


def cell(lstm: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of an LSTM: gates i, f, g, o."""
    h, c = state
    gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h, (h, c)


def read(net: PointerNetwork, points: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """States of the points (N, H) and the decoder's first state, written out from the parameters."""
    zero = points.new_zeros(net.hidden)
    if isinstance(net.encoder, torch.nn.LSTM):
        state, states = (zero, zero), []
        for point in points:
            h, state = cell(net.encoder, point, state)
            states.append(h)
        return torch.stack(states), state
    p = dict(net.encoder.named_parameters())

    def norm(x: Tensor, number: int) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * p[f"norms.{number}.weight"] + p[f"norms.{number}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    encoder: Any = net.encoder
    x, n, width = linear("embed", points), len(points), net.hidden
    if encoder.positions:
        angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(-(-width // 2)) / -(-width // 2))
        x = x + torch.cat([angle.sin(), angle.cos()], 1)[:, :width].to(x)
    layers = len(encoder.qkv)
    for layer in range(layers):
        q, k, v = linear(f"qkv.{layer}", norm(x, 2 * layer)).view(n, 3, encoder.heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        x = x + linear(f"out.{layer}", (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, width))
        inner = linear(f"widen.{layer}", norm(x, 2 * layer + 1))
        x = x + linear(f"narrow.{layer}", 0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
    x = norm(x, 2 * layers)
    return x, (x.mean(0), zero)


def by_formula(net: PointerNetwork, points: Tensor, pointers: list[int]) -> Tensor:
    """Log-probability of one sequence, step by step, from the equations."""
    states, state = read(net, points)
    e = torch.cat([net.end_state[None], states])
    inputs, total = net.go, torch.zeros((), dtype=points.dtype)
    for pointer in pointers:
        query, state = cell(net.decoder, inputs, state)
        for glimpse in net.glimpses:
            glimpse: Any
            u = torch.stack(
                [glimpse.score @ torch.tanh(glimpse.key.weight @ x + glimpse.query.weight @ query) for x in e]
            )
            query = u.softmax(0) @ e
        at = net.pointer
        u = torch.stack([at.score @ torch.tanh(at.key.weight @ x + at.query.weight @ query) for x in e])
        u = u if net.tanh_clip is None else net.tanh_clip * u.tanh()
        total = total + u.log_softmax(0)[pointer]
        inputs = net.end_point if pointer == 0 else points[pointer - 1]
    return total


POSITIONS = {"encoder": "transformer", "encoder_layers": 2, "encoder_heads": 2, "encoder_positions": True}


@pytest.mark.parametrize("options", [*KINDS, POSITIONS], ids=str)
def test_log_probabilities_equal_the_network_written_out(options: dict[str, Any]) -> None:
    """Step by step from the parameters alone: no layer of the package, no operator of the core."""
    torch.manual_seed(1)
    net = PointerNetwork(8, init_range=0.8, **options).double()
    for name, parameter in net.named_parameters():
        if "norms" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    points, pointers = torch.rand(1, 5, 2, dtype=torch.float64), [3, 1, 5, 0]
    log_prob = net(points, torch.tensor([pointers]))
    actual = log_prob[0].gather(1, torch.tensor(pointers)[:, None]).sum()
    expected = by_formula(net, points[0], pointers)
    assert abs(actual - expected) < 1e-10
    actual_gradient = torch.autograd.grad(actual, net.pointer.score)[0]
    assert (actual_gradient - torch.autograd.grad(expected, net.pointer.score)[0]).abs().max() < 1e-10


def test_padded_instances_equal_instances_alone(network: PointerNetwork) -> None:
    points = torch.rand(3, 6, 2, dtype=torch.float64)
    lengths = torch.tensor([4, 6, 2])
    pointers = torch.tensor([[1, 4, 0], [6, 2, 0], [2, 1, 0]])
    batch = network(points, pointers, lengths=lengths)
    found = network.decode(points, lengths=lengths, constraint="tour")
    for row, length in enumerate(lengths.tolist()):
        alone = network(points[row : row + 1, :length], pointers[row : row + 1])
        assert (batch[row, :, : length + 1] - alone[0]).abs().max() < 1e-10
        assert bool((batch[row, :, length + 1 :] == -torch.inf).all())
        tour = network.decode(points[row : row + 1, :length], constraint="tour")
        assert found.pointers[row, :length].tolist() == tour.pointers[0].tolist()
        assert found.pointers[row, length:].tolist() == [0] * (6 - length)
        assert abs(found.log_prob[row] - tour.log_prob[0]) < 1e-10


@pytest.mark.parametrize("beam", [1, 3])
def test_tours_visit_every_point_once(network: PointerNetwork, beam: int) -> None:
    found = network.decode(torch.rand(20, 6, 2, dtype=torch.float64), constraint="tour", beam=beam)
    assert bool((found.pointers.sort(1).values == torch.arange(1, 7)).all())


def test_distinct_answers_repeat_no_point(network: PointerNetwork) -> None:
    found = network.decode(torch.rand(20, 5, 2, dtype=torch.float64), constraint="distinct", beam=2)
    for row in found.pointers.tolist():
        visited = [pointer for pointer in row if pointer]
        assert len(set(visited)) == len(visited)


def test_a_beam_as_wide_as_all_tours_finds_the_most_probable_one(network: PointerNetwork) -> None:
    points = torch.rand(1, 4, 2, dtype=torch.float64)
    tours = torch.tensor(list(itertools.permutations(range(1, 5))))
    log_prob = network(points.expand(24, -1, -1), tours, constraint="tour")
    total = log_prob.gather(-1, tours[..., None]).squeeze(-1).sum(1)
    found = network.decode(points, constraint="tour", beam=24)
    assert found.pointers[0].tolist() == tours[total.argmax()].tolist()
    assert abs(found.log_prob[0] - total.max()) < 1e-10


@pytest.mark.parametrize("constraint", ["none", "distinct", "tour"])
def test_the_search_s_probability_is_that_of_teacher_forcing(network: PointerNetwork, constraint: Constraint) -> None:
    points = torch.rand(4, 5, 2, dtype=torch.float64)
    found = network.decode(points, constraint=constraint, beam=2, max_steps=5)
    log_prob = network(points, found.pointers, constraint=constraint)
    taken = log_prob.gather(-1, found.pointers[..., None]).squeeze(-1)
    before = torch.cat([torch.ones(4, 1), found.pointers[:, :-1]], dim=1) > 0
    assert (taken.where(before, 0.0).sum(1) - found.log_prob).abs().max() < 1e-10


def test_a_wider_beam_finds_more_probable_answers_on_average(network: PointerNetwork) -> None:
    points = torch.rand(50, 6, 2, dtype=torch.float64)
    greedy, wide = (network.decode(points, constraint="tour", beam=beam).log_prob.mean() for beam in (1, 4))
    assert wide >= greedy


def test_the_transformer_encoder_ignores_the_order_of_points() -> None:
    torch.manual_seed(0)
    net = PointerNetwork(8, encoder="transformer", encoder_layers=2, encoder_heads=2).double()
    points, order = torch.rand(2, 5, 2, dtype=torch.float64), torch.tensor([3, 0, 4, 1, 2])
    states, moved = net.encode(points), net.encode(points[:, order])
    assert (states.states[:, 1:][:, order] - moved.states[:, 1:]).abs().max() < 1e-12
    assert (states.start[0] - moved.start[0]).abs().max() < 1e-12


def test_a_transformer_with_positions_knows_the_order_of_points() -> None:
    torch.manual_seed(0)
    net = PointerNetwork(9, encoder="transformer", encoder_layers=1, encoder_heads=3, encoder_positions=True).double()
    points, order = torch.rand(2, 5, 2, dtype=torch.float64), torch.tensor([3, 1, 4, 0, 2])
    states, permuted = net.encode(points).states, net.encode(points[:, order]).states
    assert (states[:, 1:][:, order] - permuted[:, 1:]).abs().max() > 1e-3


def test_every_parameter_but_the_end_s_coordinates_learns(network: PointerNetwork) -> None:
    loss = PointingTask(network).loss(torch.rand(2, 4, 2, dtype=torch.float64), torch.tensor([[1, 2, 0], [4, 0, 0]]))
    loss["loss"].backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(still) <= {"end_point"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got hidden=0"),
        ({"encoder": "gru"}, "encoder must be 'lstm' or 'transformer', got encoder='gru'"),
        ({"hidden": 9, "encoder": "transformer"}, "hidden must be a multiple of encoder_heads"),
        ({"tanh_clip": 0.0}, "tanh_clip must be positive or None"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PointerNetwork(**options)


def test_unusable_input_is_named() -> None:
    net, points = PointerNetwork(8), torch.rand(2, 4, 2)
    for call, words in [
        (lambda: net.encode(torch.rand(2, 4, 3)), r"points must be \(B, N, 2\), got \(2, 4, 3\)"),
        (lambda: net.encode(torch.rand(2, 0, 2)), "there are no points"),
        (lambda: net.encode(points, torch.tensor([5, 1])), "lengths must be 2 numbers in 1…4"),
        (lambda: net(points, torch.tensor([[5], [1]])), "pointers must be in 0…4, got 1…5"),
        (lambda: net(points, torch.tensor([1, 2])), r"pointers must be \(2, T\)"),
        (lambda: net.decode(points, beam=0), "beam must be at least 1, got beam=0"),
        (lambda: net.decode(points, constraint="path"), "constraint must be 'none', 'distinct' or 'tour'"),  # pyright: ignore[reportArgumentType]
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_points_may_have_more_coordinates_and_weights_another_start() -> None:
    net = PointerNetwork(8, channels=3, init_range=0.01)
    assert max(float(p.detach().abs().max()) for p in net.parameters()) <= 0.01
    assert sorted(net.decode(torch.rand(1, 4, 3), constraint="tour").pointers[0].tolist()) == [1, 2, 3, 4]
    deep = PointerNetwork(8, encoder="transformer", encoder_layers=3, encoder_heads=2, init_range=0.8)
    assert len(deep.encoder.qkv) == 3  # pyright: ignore[reportArgumentType]
    points, pointers = torch.rand(1, 4, 2), torch.tensor([[1, 2, 3, 4]])
    one_head = PointerNetwork(8, encoder="transformer", encoder_layers=3, encoder_heads=1)
    one_head.load_state_dict(deep.state_dict())
    assert (deep(points, pointers) - one_head(points, pointers)).abs().max() > 1e-4
