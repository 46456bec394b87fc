"""Modules added to networks of timm: where they stand, what they cost, and what a network so changed can still do."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vision_models
from vision_models import create_model, insert
from vision_models.insertion import list_modules
from vision_models.insertion.places import Passing, passed, places

# Twenty kinds of networks, cut down: timm's name, options, and the side of the images.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "test_resnet": ({}, 64),
    "test_byobnet": ({}, 64),
    "test_nfnet": ({}, 64),
    "test_efficientnet": ({}, 64),
    "test_convnext": ({}, 64),
    "test_mambaout": ({}, 64),
    "test_vit": ({}, 160),
    "test_vit3": ({}, 160),
    "test_vit_relpos": ({}, 160),
    "test_coatnet": ({}, 160),
    "test_maxvit": ({}, 160),
    "mobilenetv2_035": ({}, 64),
    "mobilenetv3_small_050": ({}, 64),
    "densenet121": ({"block_config": (2, 2), "growth_rate": 8}, 64),
    "swin_tiny_patch4_window7_224": (
        {"depths": (2, 1), "embed_dim": 16, "num_heads": (1, 2), "img_size": 56, "window_size": 7},
        56,
    ),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}, 64),
    "poolformer_s12": ({}, 64),
    "xcit_nano_12_p16_224": ({"depth": 2, "embed_dim": 32, "img_size": 64}, 64),
    "test_biformer": ({}, 64),
    "test_agent_deit": ({}, 96),
}
# What the default run tries; the others are slow together.
QUICK = ("test_resnet", "mobilenetv2_035", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "pvt_v2_b0")
OPTIONS: dict[str, dict[str, Any]] = {"ulsam": {"num_groups": 1}, "gaam": {"num_heads": 1}}


def network(name: str, **options: Any) -> tuple[Any, Tensor, tuple[int, int, int]]:
    """In eval mode, with an image and its size; branches that start at zero, as timm's do, would hide a gate."""
    settings, side = KINDS[name]
    model: Any = timm.create_model(name, **settings, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, torch.randn(2, 3, side, side), (3, side, side)


def changed(name: str, module: str = "ela", **options: Any) -> tuple[Any, Tensor, Any]:
    model, x, size = network(name)
    added = insert(model, module, input_size=size, latency=False, **OPTIONS.get(module, {}), **options)
    for path, parameter in model.named_parameters():  # zero inits would hide it
        if f".{module}." in path:
            nn.init.normal_(parameter, std=0.5)
    return model, x, added


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in KINDS])
def test_every_kind_of_network_takes_a_module_before_its_additions(name: str) -> None:
    model, x, size = network(name)
    names, before = list(model.state_dict()), model(x)
    added = insert(model, "ela", input_size=size, latency=False)
    assert len(added.places) >= 1
    ours = [path for path in model.state_dict() if ".ela." in path]
    assert [path for path in model.state_dict() if ".ela." not in path] == names  # weights keep their names
    assert {path.partition(".ela.")[0] for path in ours} == {place.name for place in added.places}
    calls: list[tuple[str, int]] = []
    for place in added.places:
        host = model.get_submodule(place.name)
        host.ela.register_forward_hook(lambda _, args, __, place=place: calls.append((place.name, args[0].shape[1])))
    assert not torch.allclose(model(x), before)
    assert sorted(calls) == sorted((place.name, place.dim) for place in added.places)  # each once, with its channels
    added.remove()
    torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("name", "first", "layout", "grid", "prefix"),
    [
        ("test_resnet", "layer1.0.bn2", "NCHW", (16, 16), 0),
        ("mobilenetv2_035", "blocks.0.0.bn2", "NCHW", (32, 32), 0),
        ("test_convnext", "stages.0.blocks.0.mlp", "NHWC", (16, 16), 0),
        ("test_vit", "blocks.0.mlp", "NLC", (10, 10), 1),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.mlp", "NLC", (14, 14), 0),
        ("pvt_v2_b0", "stages.0.blocks.0.mlp", "NLC", (16, 16), 0),
        ("densenet121", "features.denseblock1.denselayer1.conv2", "NCHW", (16, 16), 0),
    ],
)
def test_branches_end_where_papers_put_gates(
    name: str, first: str, layout: str, grid: tuple[int, int], prefix: int
) -> None:
    model, _, size = network(name)
    seen = Passing(size)
    passed(model, seen)
    place = places(model, "branches", seen)[0]
    assert (place.name, place.layout, place.grid, place.prefix) == (first, layout, grid, prefix)


def test_blocks_and_stages_stand_behind_the_addition() -> None:
    model, _, size = network("test_resnet")
    seen = Passing(size)
    passed(model, seen)
    blocks = [place.name for place in places(model, "blocks", seen)]
    assert blocks == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert [place.name for place in places(model, "stages", seen)] == blocks
    assert [p.name for p in places(model, ["layer[34].*.bn1", "conv1.0"], seen)] == [
        "conv1.0",
        "layer3.0.bn1",
        "layer4.0.bn1",
    ]


@pytest.mark.parametrize("module", list_modules())
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_module_works_on_maps_and_tokens(name: str, module: str) -> None:
    model, x, added = changed(name, module)
    model.train()
    model(x).square().mean().backward()
    gradients = [p.grad for path, p in model.named_parameters() if f".{module}." in path]
    assert len(gradients) > 0
    assert any(gradient is not None and gradient.abs().amax() > 0 for gradient in gradients)
    assert added.parameters == sum(p.numel() for path, p in model.named_parameters() if f".{module}." in path)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_what_passes_a_place_is_the_module_of_the_map(name: str) -> None:
    """The hook beside the same arithmetic by hand, layout by layout."""
    model, x, added = changed(name)
    place = added.places[-1]
    host = model.get_submodule(place.name)
    hook = next(hook for hook in host._forward_hooks.values() if getattr(hook, "place", None) == place)
    rows, columns = place.grid
    if place.layout == "NCHW":
        output = torch.randn(2, place.dim, rows, columns)
        expected = host.ela(output)
    elif place.layout == "NHWC":
        output = torch.randn(2, rows, columns, place.dim)
        expected = torch.stack([host.ela(image.permute(2, 0, 1)[None])[0].permute(1, 2, 0) for image in output])
    else:
        output = torch.randn(2, place.prefix + rows * columns, place.dim)
        maps = torch.zeros(2, place.dim, rows, columns)
        for r in range(rows):
            for c in range(columns):
                maps[:, :, r, c] = output[:, place.prefix + r * columns + c]
        gated, expected = host.ela(maps), output.clone()
        for r in range(rows):
            for c in range(columns):
                expected[:, place.prefix + r * columns + c] = gated[:, :, r, c]
    torch.testing.assert_close(hook(host, (x,), output), expected)
    torch.testing.assert_close(hook(host, (x,), (output, 7)), (expected, 7))


def test_tokens_of_another_image_are_laid_out_in_its_proportion() -> None:
    model: Any = timm.create_model("test_vit", img_size=(96, 192), dynamic_img_size=True).eval()
    added = insert(model, "ela", latency=False)
    assert added.places[0].grid == (6, 12)
    assert model(torch.randn(1, 3, 128, 256)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"ela: 49 tokens behind 'blocks.0.mlp' are no grid like 6×12"):
        model(torch.randn(1, 3, 112, 112))


def test_blocks_that_are_told_the_size_of_their_map_use_it() -> None:
    model: Any = timm.create_model("pvt_v2_b0", **KINDS["pvt_v2_b0"][0]).eval()
    insert(model, "ela", "stages.*.blocks.0", input_size=(3, 64, 64), latency=False)
    seen: list[Any] = []
    model.stages[0].blocks[0].ela.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[2:])))
    model(torch.randn(1, 3, 64, 160))
    assert seen == [(16, 40)]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_changed_network_is_still_timms(name: str) -> None:
    model, x, _ = changed(name)
    expected = model(x)
    twin, _, size = network(name)
    insert(twin, "ela", input_size=size, latency=False)
    twin.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(twin(x), expected)
    copied = copy.deepcopy(model)
    for other in (copied, pickle.loads(pickle.dumps(model))):  # as processes of a data-parallel run get it
        torch.testing.assert_close(other(x), expected)
        nn.init.zeros_(next(p for path, p in other.named_parameters() if ".ela.rows.norm.weight" in path))
        assert not torch.allclose(other(x), expected)  # it runs its own modules
    torch.testing.assert_close(model(x), expected)
    count = len(model.state_dict())
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert len(model.state_dict()) == count
    model.set_grad_checkpointing()
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for path, p in model.named_parameters() if ".ela." in path)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_feature_networks_take_modules_too(name: str) -> None:
    model, x, size = network(name, features_only=True)
    before = model(x)
    added = insert(model, "ela", input_size=size, latency=False)
    after = model(x)
    assert len(added.places) >= 1
    assert [level.shape for level in after] == [level.shape for level in before]
    assert not torch.allclose(after[-1], before[-1])


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(model, (x,)).module()


def traced(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:  # noqa: ARG001  as exported
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.compile
@pytest.mark.parametrize("how", [exported, traced])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_and_its_modules_are_one_graph(name: str, how: Any) -> None:
    model, x, _ = changed(name)
    with torch.no_grad():
        torch.testing.assert_close(how(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("how", [exported, traced])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_and_its_modules_are_one_graph(name: str, how: Any) -> None:
    model, x, _ = changed(name)
    with torch.no_grad():
        torch.testing.assert_close(how(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("module", list_modules())
def test_every_module_compiles_and_exports(module: str) -> None:
    model, x, _ = changed("test_resnet", module)
    with torch.no_grad():
        for how in (exported, traced):
            torch.testing.assert_close(how(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_answer_counts_parameters_multiply_adds_and_milliseconds() -> None:
    model, _, size = network("test_resnet")
    count = sum(p.numel() for p in model.parameters())
    added = insert(model, "ela", "layer1.0", variant="t", input_size=size)
    dim, (rows, columns) = added.places[0].dim, added.places[0].grid
    assert (added.parameters, added.parameters_before) == (dim * 5 + 2 * dim, count)
    assert added.multiply_adds == dim * 5 * (rows + columns)
    assert added.latency is not None
    assert added.latency_before is not None
    assert added.latency_before > 0
    lines = str(added).splitlines()
    assert lines[0] == "ela at 1 places of one image 3×64×64: layer1.0"
    assert [re.split(r" {2,}", line)[0] for line in lines[1:]] == ["parameters", "multiply-adds", "latency"]
    assert f"+ {added.parameters:>10,}" in lines[1]
    assert added.parameters_before + added.parameters == sum(p.numel() for p in model.parameters())


def test_meta_networks_are_measured_without_memory_or_time() -> None:
    with torch.device("meta"):
        model: Any = timm.create_model("resnet50")
    added = insert(model, "ela")
    assert (len(added.places), added.parameters, added.latency) == (16, 135_936, None)
    assert str(added).splitlines()[0].endswith("layer1.0.bn3, layer1.1.bn3, …, layer4.2.bn3")
    assert next(model.layer1[0].bn3.ela.parameters()).is_meta


def test_adding_leaves_modes_and_statistics_alone() -> None:
    model, _, size = network("test_resnet")
    model.train()
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    insert(model, "eca", "layer[12].0", input_size=size)
    assert (model.training, model.layer1[0].training, model.layer1[0].eca.training) == (True, False, False)
    assert model.layer2[0].eca.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if ".eca." not in name)


def test_modules_take_the_precision_of_their_place() -> None:
    model, _, size = network("test_resnet")
    model.double()
    insert(model, "gaam", input_size=size, latency=False)
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("elan",), {}, "unknown module 'elan'; did you mean 'ela'"),
        (("ela", "branch"), {}, "there is no where='branch'; did you mean 'branches'"),
        (("ela", "layer1.0.bn4"), {}, r"there is no where='layer1.0.bn4'; did you mean 'layer1.0.bn\d'"),
        (("ela", "layer7.*.bn2"), {}, r"no module fits where='layer7.\*.bn2'; did you mean 'layer\d.0.bn2'"),
        (("ela", "fc"), {}, "where='fc' belongs to the classifier, which reset_classifier replaces"),
        (("ela", "global_pool"), {}, r"output of where='global_pool' is of shape \(1, \d+\) for one image"),
        (("ela", []), {}, r"where must be a name or a list of names, got where=\[\]"),
        (("ela",), {"variants": "t"}, "insert: ela has no option 'variants'; did you mean 'variant'"),
        (("ela",), {"dim": 3}, "insert: ela has no option 'dim'"),
        (("ela",), {"variant": "q"}, "ELA: variant must be"),
        (("gaam",), {"num_heads": 4096}, "num_heads=4096 exceeds the"),
        (("ela",), {"input_size": (4, 64, 64)}, r"the network fails on input_size=\(4, 64, 64\)"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_the_network_alone(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    model, _, size = network("test_resnet")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        insert(model, *arguments, **{"input_size": size, "latency": False, **options})
    assert list(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())


def test_a_place_takes_a_module_once_and_others_beside_it() -> None:
    model, x, size = network("test_resnet")
    insert(model, "ela", input_size=size, latency=False)
    with pytest.raises(ValueError, match=r"insert: 'layer1.0.bn2' has a 'ela' already; remove\(\) it"):
        insert(model, "ela", input_size=size, latency=False)
    before = model(x)
    insert(model, "se", input_size=size, latency=False)
    assert not torch.allclose(model(x), before)


def test_what_cannot_be_changed_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be a network, got str"):
        insert("resnet50", "ela")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the model is compiled already; add modules before torch\.compile"):
        insert(torch.compile(network("test_resnet")[0]), "ela")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"this Sequential names no input size; pass input_size="):
        insert(nn.Sequential(nn.Conv2d(3, 8, 3)), "ela")
    windows, _, size = network("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match=r"where='layers.0.blocks.0.attn' is of shape \(4, 49, 16\) for one image"):
        insert(windows, "ela", "layers.0.blocks.0.attn", input_size=size)
    with pytest.raises(ValueError, match=r"where='features.denseblock1' is a DenseBlock of 2 modules"):
        insert(network("densenet121")[0], "ela", "stages", input_size=(3, 64, 64))
    plain = timm.create_model("vgg11_bn", device="meta")
    with pytest.raises(ValueError, match=r"this VGG does not tell its branches; say where='blocks' or 'stages'"):
        insert(plain, "ela", input_size=(3, 64, 64))


def test_networks_outside_timm_work_with_an_input_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
    added = insert(model, "eca", "1", input_size=(3, 9, 7), latency=False)
    assert added.places[0].dim == 8
    assert model(torch.randn(2, 3, 9, 7)).shape == (2, 16, 5, 3)


def test_our_own_backbones_take_modules_by_either_name() -> None:
    model = create_model("test_biformer").eval()
    assert vision_models.insert(model, "little_attention", "stages", latency=False).places[0].layout == "NCHW"
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), create_model_like(model)(x))


def create_model_like(model: nn.Module) -> nn.Module:
    """The same weights without what was added."""
    twin = create_model("test_biformer").eval()
    twin.load_state_dict({name: v for name, v in model.state_dict().items() if ".little_attention." not in name})
    return twin
