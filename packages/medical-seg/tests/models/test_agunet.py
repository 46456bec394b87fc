"""AGUNet and DAUNet against the Keras layers, written out again voxel by voxel, in float64, channels last."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medical_seg.layers.dual_attention import ChannelAttention, PositionAttention
from medical_seg.models.agunet import AGUNet, AttentionUNet
from medical_seg.models.daunet import DAUNet
from medical_seg.models.keras_weights import build_from_keras, load_official, to_keras

FILTERS = (4, 8, 16)
GRID = (4, 12, 8)


class Keras:
    """The official graph: takes each layer's arrays in order of creation."""

    def __init__(
        self, layers: dict[str, list[list[np.ndarray]]], projections: list[Tensor], *, training: bool = False
    ) -> None:
        self.of = {kind: iter([list(map(torch.from_numpy, row)) for row in rows]) for kind, rows in layers.items()}
        self.projections, self.training = projections, training

    def conv(self, x: Tensor) -> Tensor:
        kernel, bias = next(self.of["conv3d"])
        return self._slide(x, kernel) + bias

    @staticmethod
    def _slide(x: Tensor, kernel: Tensor) -> Tensor:
        """padding="same", stride 1."""
        padded = F.pad(x, (0, 0, *[kernel.shape[0] // 2] * 6))
        out = torch.zeros(*x.shape[:-1], kernel.shape[-1], dtype=x.dtype)
        for d, h, w in np.ndindex(*kernel.shape[:3]):
            out = out + padded[:, d : d + x.shape[1], h : h + x.shape[2], w : w + x.shape[3]] @ kernel[d, h, w]
        return out

    def up(self, x: Tensor, stride: int = 2) -> Tensor:
        """Voxel i writes to stride·i + tap; what passes n·stride is cut off."""
        kernel, bias = next(self.of["conv3d_transpose"])
        sizes = [stride * n for n in x.shape[1:4]]
        out = torch.zeros(len(x), *[n + 3 for n in sizes], kernel.shape[3], dtype=x.dtype)
        for d, h, w in np.ndindex(3, 3, 3):
            out[:, d : d + sizes[0] : stride, h : h + sizes[1] : stride, w : w + sizes[2] : stride] += (
                x @ kernel[d, h, w].T
            )
        return out[:, : sizes[0], : sizes[1], : sizes[2]] + bias

    def norm(self, x: Tensor) -> Tensor:
        scale, shift, mean, variance = next(self.of["batch_normalization"])
        if self.training:
            mean = x.mean((0, 1, 2, 3))
            variance = (x - mean).square().mean((0, 1, 2, 3))
        return (x - mean) / (variance + 1e-3).sqrt() * scale + shift

    def block(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = relu(self.norm(self.conv(x)))
        return x

    def gate(self, g: Tensor, e: Tensor) -> Tensor:
        signal = self.norm(self.conv(g))
        skip = self.norm(self.conv(e))
        psi = self.norm(self.conv(relu(torch.cat([signal, skip], -1))))
        return e / (1 + torch.exp(-psi))

    def dual(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 3)
        key, query, value = (tokens @ kernel for kernel in self.projections)
        position = softmax(query @ key.mT) @ value
        pam = x + next(self.of["pam"])[0] * position.view_as(x)
        pam = self.conv(relu(self.norm(self.conv(pam))))
        mixed = tokens @ softmax(tokens.mT @ tokens)
        cam = x + next(self.of["cam"])[0] * mixed.view_as(x)
        cam = self.conv(relu(self.norm(self.conv(cam))))
        return self.norm(self.conv(pam + cam))

    def run(
        self, x: Tensor, filters: tuple[int, ...], *, dual: bool, pyramid: bool, deep: bool, guided: bool
    ) -> list[Tensor]:
        small, skips = x, []
        for level in range(len(filters) - 1):
            if pyramid and level:
                x = torch.cat([relu(self.conv(small)), x], -1)
            x = self.block(x)
            skips.insert(0, x)
            x, small = cells(x).amax(-1), cells(small).mean(-1)
        bottom = x = self.dual(self.block(x)) if dual else self.block(x)
        stages = []
        for level, skip in enumerate(skips):
            if dual:
                x = self.up(x)
                guide = [self.up(bottom, 2 ** (level + 1))] if guided else []
                x = self.block(relu(self.norm(torch.cat([*guide, skip, x], -1))))
            else:
                g = relu(self.norm(self.up(x)))
                x = self.block(torch.cat([g, self.gate(g, skip)], -1))
            stages.append(x)
        if not deep:
            return [softmax(self.conv(x))]
        return [softmax(self.conv(stage)) for stage in stages][::-1]


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def cells(x: Tensor) -> Tensor:
    """The eight voxels of each coarser one, last."""
    b, d, h, w, c = x.shape
    return x.view(b, d // 2, 2, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(5)


def randomized(model: AttentionUNet) -> AttentionUNet:
    """Every weight and statistic is drawn: zeros and ones would hide mistakes."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean", "gamma")) or tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape) * 0.3 + 0.2)
    return model


OPTIONS = [
    (dual, pyramid, deep, guided) for dual, pyramid, deep, guided in np.ndindex(2, 2, 2, 2) if dual or not guided
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dual", "pyramid", "deep", "guided"), OPTIONS)
def test_outputs_and_gradients_equal_the_keras_layers(
    dual: int, pyramid: int, deep: int, guided: int, training: bool
) -> None:
    options: dict[str, Any] = {"deep_supervision": bool(deep), "input_pyramid": bool(pyramid), "dropout": 0.0}
    if dual:
        options |= {"attention_guiding": bool(guided), "guide": "holes"}
    torch.manual_seed(0)
    model: Any = randomized((DAUNet if dual else AGUNet)(3, 2, 3, FILTERS, **options)).double().train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout3d):  # the one behind both attentions has a rate of its own
            module.p = 0.0
    projections = []
    if dual:
        attend: Any = next(m for m in model.modules() if isinstance(m, PositionAttention))
        for conv in (attend.key_conv, attend.query_conv, attend.value_conv):
            projections.append(conv.weight.detach()[:, :, 0, 0, 0].T)
    x = torch.randn(2, 2, *GRID, dtype=torch.float64)
    images = [x.clone().requires_grad_() for _ in range(2)]
    # Arrays first: a pass in training moves the statistics.
    keras = Keras({kind: [[a.copy() for a in row] for row in rows] for kind, rows in to_keras(model).items()},
                  projections, training=training)  # fmt: skip
    theirs = keras.run(
        images[0].permute(0, 2, 3, 4, 1),
        FILTERS,
        dual=bool(dual),
        pyramid=bool(pyramid),
        deep=bool(deep),
        guided=bool(guided),
    )
    found = model(images[1])
    assert isinstance(found, list) == bool(training and deep)
    ours = [maps.softmax(1).permute(0, 2, 3, 4, 1) for maps in (found if isinstance(found, list) else [found])]
    for actual, expected in zip(ours, theirs, strict=bool(training)):
        assert float((actual - expected).detach().abs().max()) < 1e-12
    draws = [torch.randn_like(maps) for maps in ours]
    gradients = [
        torch.autograd.grad(torch.stack([(m * w).sum() for m, w in zip(maps, draws, strict=False)]).sum(), image)[0]
        for image, maps in zip(images, (theirs, ours), strict=True)
    ]
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-10 * max(1.0, float(gradients[0].abs().max()))
    if not training:
        with torch.no_grad():
            single = model.float()(x.float()).softmax(1).permute(0, 2, 3, 4, 1)
        assert float((single - theirs[0].detach()).abs().max()) < 2e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_a_stem_folds_voxels_into_channels_and_each_is_judged_beside_its_own_value(dims: int) -> None:
    torch.manual_seed(0)
    net: Any = randomized(AGUNet(dims, 2, 3, FILTERS, stem=2, deep_supervision=True, dropout=0.0)).double()
    same: Any = AGUNet(dims, 2 * 2**dims, 3, FILTERS, dropout=0.0).double()  # of the folded image, its head unused
    same.load_state_dict({k: v for k, v in net.state_dict().items() if "heads" not in k}, strict=False)
    image = torch.randn(2, 2, *(8, 16, 8)[:dims], dtype=torch.float64)
    corners = list(np.ndindex(*[2] * dims))

    def pointwise(conv: Any, maps: Tensor) -> Tensor:
        return torch.einsum("oc,bc...->bo...", conv.weight.flatten(1), maps) + conv.bias.view(-1, *[1] * dims)

    def of(corner: tuple[int, ...]) -> Any:
        return (..., *(slice(first, None, 2) for first in corner))

    folded = torch.stack([image[of(corner)] for corner in corners], 2).flatten(1, 2)  # corners vary fastest
    found, stages = net(image), same.decode(*same.encode(folded))
    assert len(found) == 2
    for actual, head, stage in zip(found, reversed(net.heads), reversed(stages), strict=True):
        spread = pointwise(head.spread, stage).unflatten(1, (-1, len(corners)))
        fine = torch.zeros(2, spread.shape[1], *image.shape[2:], dtype=torch.float64)
        for number, corner in enumerate(corners):
            fine[of(corner)] = spread[:, :, number]
        expected = pointwise(head.head, pointwise(head.join, torch.cat([fine, image], 1)).clamp(min=0))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        image = torch.stack([image[of(corner)] for corner in corners]).mean(0)
    assert net.divisor == 8


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (AGUNet, {}, 16_405_742),
        (AGUNet, {"deep_supervision": True}, 16_406_580),
        (AGUNet, {"input_pyramid": True}, 18_656_878),
        (AGUNet, {"input_pyramid": True, "deep_supervision": True}, 18_657_716),
        (DAUNet, {}, 23_467_908 + 81_920),
        (DAUNet, {"attention_guiding": True, "guide": "holes"}, 28_701_588 + 81_920),
        (
            DAUNet,
            {"input_pyramid": True, "deep_supervision": True, "attention_guiding": True, "guide": "holes"},
            30_953_562 + 81_920,
        ),
    ],
)
def test_parameters_are_the_official_ones_and_the_untracked_projections(
    model: Any, options: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in model(**options).parameters()) == expected


def write_h5(path: Path, layers: dict[str, list[list[np.ndarray]]], first: int) -> None:
    """As Keras: numbered per class from wherever it had arrived, listed in another order, sometimes nested."""
    names = {"conv3d": ["kernel", "bias"], "conv3d_transpose": ["kernel", "bias"], "pam": ["gamma"], "cam": ["gamma"]}
    names["batch_normalization"] = ["gamma", "beta", "moving_mean", "moving_variance"]
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        listed = []
        for kind, rows in layers.items():
            for index, arrays in enumerate(rows):
                layer = kind if first + index == 0 else f"{kind}_{first + index}"
                group = root.create_group(layer)
                weights = [f"{layer}/{name}:0" for name in names[kind]]
                group.attrs["weight_names"] = [name.encode() for name in weights]
                for name, array in zip(weights, arrays, strict=True):
                    group[name] = array
                listed.append(layer.encode())
        root.create_group("input_1").attrs["weight_names"] = []
        root.attrs["layer_names"] = [b"input_1", *listed[::-1]]


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("agunet", {}),
        ("agunet", {"input_pyramid": True, "deep_supervision": True}),
        ("daunet", {"input_pyramid": True}),
        ("daunet", {"attention_guiding": True, "guide": "holes", "deep_supervision": True}),
    ],
)
def test_a_keras_file_gives_the_network_that_wrote_it(arch: Any, options: Any, first: int, tmp_path: Path) -> None:
    model = randomized({"agunet": AGUNet, "daunet": DAUNet}[arch](3, 2, 3, FILTERS, **options)).eval()
    write_h5(tmp_path / "model.h5", to_keras(model), first)
    loaded = build_from_keras(tmp_path / "model.h5", arch, seed=1).eval()
    assert loaded.filters == FILTERS
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if "query" not in name and "key_conv" not in name and "value" not in name and "num_batches" not in name:
            assert torch.equal(value, theirs[name]), name


def test_projections_that_no_file_holds_are_drawn_from_the_seed_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_h5(tmp_path / "m.h5", to_keras(DAUNet(3, 1, 2, FILTERS)), 0)
    a, b, c = (build_from_keras(tmp_path / "m.h5", "daunet", seed=seed).state_dict() for seed in (3, 3, 4))
    assert "drawn with seed 3" in caplog.text
    name = "attend.position.0.query_conv.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


def test_keras_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.h5"
    file.write_text("no")
    with pytest.raises(ValueError, match=r"x\.h5: not an HDF5 file"):
        build_from_keras(file, "agunet")
    with h5py.File(file, "w"):
        pass
    with pytest.raises(ValueError, match="no Keras weights"):
        build_from_keras(file, "agunet")
    layers = to_keras(AGUNet(3, 1, 2, FILTERS))
    write_h5(file, layers, 0)
    with pytest.raises(ValueError, match="fits no daunet"):
        build_from_keras(file, "daunet")
    with pytest.raises(ValueError, match="--arch must be agunet or daunet, got 'unet'"):
        build_from_keras(file, "unet")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"does not fit this AGUNet: conv3d/0/0 is .* the model has"):
        load_official(AGUNet(3, 2, 2, FILTERS), layers)
    with pytest.raises(ValueError, match="does not fit this AGUNet: missing conv3d/1/0"):
        load_official(AGUNet(3, 1, 2, FILTERS), layers | {"conv3d": layers["conv3d"][:1]})
    write_h5(file, {"conv3d": [], "conv3d_transpose": []}, 0)
    with pytest.raises(ValueError, match="holds no 3-D U-Net"):
        build_from_keras(file, "agunet")
    with h5py.File(file, "w") as empty:
        empty.attrs["layer_names"] = [b"dense_1"]
        group = empty.create_group("dense_1")
        group.attrs["weight_names"] = [b"w"]
        group["w"] = np.zeros(1)
    with pytest.raises(ValueError, match="'dense_1' is of no class"):
        build_from_keras(file, "agunet")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("model", "option"),
    [(AGUNet, "attention_gates"), (DAUNet, "dual_attention"), (AGUNet, "input_pyramid"), (DAUNet, "attention_guiding")],
)
def test_every_option_can_be_switched_by_itself(model: Any, option: str, dims: int) -> None:
    x = torch.randn(1, 1, *(8, 12, 16)[:dims])
    counts = set()
    for value in (False, True):
        net = model(dims, 1, 2, FILTERS, **{option: value})
        assert net(x).shape == (1, 2, *x.shape[2:])
        counts.add(sum(p.numel() for p in net.parameters()))
    assert len(counts) == 2


def test_deep_supervision_answers_at_every_scale_in_training_only() -> None:
    net = AGUNet(2, 1, 2, FILTERS, deep_supervision=True, stem=2)
    x = torch.randn(1, 1, 16, 24)
    assert [tuple(m.shape[2:]) for m in net(x)] == [(16, 24), (8, 12)]
    assert net.eval()(x).shape == (1, 2, 16, 24)


def test_dropout_acts_in_training() -> None:
    torch.manual_seed(0)
    net = AGUNet(2, 1, 2, (16, 32), dropout=0.2)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("guide", ["linear", "holes"])
def test_linear_guiding_reaches_every_voxel_and_the_official_one_does_not(guide: Any) -> None:
    net = DAUNet(3, 1, 2, FILTERS, attention_guiding=True, guide=guide)
    stage: Any = net.decoder[1]
    x = torch.ones(1, FILTERS[-1], 2, 2, 2)
    reached = (stage.guide(x) - stage.guide(0 * x)).abs().sum(1).gt(0).float().mean()
    assert float(reached) == (1.0 if guide == "linear" else 0.75**3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AGUNet(4), r"AGUNet: spatial_dims must be 2 or 3, got spatial_dims=4"),
        (lambda: AGUNet(3, 0), r"in_channels and out_channels must be at least 1, got 0 and 2"),
        (lambda: DAUNet(3, 1, 2, (4,)), r"DAUNet: filters must name at least two levels, got filters=\(4,\)"),
        (lambda: AGUNet(stem=0), r"AGUNet: stem must be at least 1, got stem=0"),
        (lambda: DAUNet(guide="nearest"), r"guide must be 'linear' or 'holes', got guide='nearest'"),  # pyright: ignore[reportArgumentType]
        (lambda: DAUNet(3, 1, 2, (4, 6)), r"channels/reduction=6/8 channels are empty"),
        (lambda: ChannelAttention("x"), r"ChannelAttention: rule must be 'danet' or 'daunet', got rule='x'"),  # pyright: ignore[reportArgumentType]
        (lambda: AGUNet(3, 1, 2, FILTERS)(torch.zeros(1, 1, 8, 8)), r"AGUNet: expected \(B C X Y Z\), got shape"),
        (lambda: AGUNet(2, 1, 2, FILTERS)(torch.zeros(1, 3, 8, 8)), r"the network reads 1 channels, got 3"),
        (
            lambda: AGUNet(2, 1, 2, FILTERS)(torch.zeros(1, 1, 9, 8)),
            r"AGUNet: grid 9×8 is not divisible by 4; pad to 12×8",
        ),
    ],
)
def test_wrong_sizes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = randomized(DAUNet(3, 1, 2, FILTERS)).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        expected = net(x).softmax(1)
        ours = net.to(dtype)(x.to(dtype)).softmax(1)
    assert float((ours.float() - expected).abs().max()) < (6e-2 if dtype == torch.bfloat16 else 1e-2)


@pytest.mark.compile
def test_compiles_to_one_graph() -> None:
    net = AGUNet(2, 1, 2, (4, 8)).eval()
    x = torch.randn(1, 1, 8, 8)
    compiled: Any = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), net(x), atol=1e-5)
