"""timm's contract and ours, for every registered model; a new model is covered the moment it is registered."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vision_models
from vision_models import create_model, list_models
from vision_models.models import CATALOG, timm_name

SMALL = [name for name in list_models() if name.startswith("test_")]
ALL = list_models()
# options that change the path through the model
VARIATIONS: dict[str, list[dict[str, Any]]] = {
    "test_biformer": [{}, {"pad_mode": "masked"}, {"pad_mode": "nchw"}, {"soft_routing": True}],
    "test_halonet": [{}, {"border": "masked", "channel_attn": "eca"}, {"block_size": 3, "channel_attn": "se"}],
    "test_ravlt": [{}, {"attention": "linear"}, {"attention": "softmax"}],
    "test_davit": [
        {},
        {"channel_attention_version": 2, "down_kernel_size": 3},
        {"head_norm_first": True, "ffn": False},
    ],
    "test_focalnet": [
        {},
        {"overlap_down": True, "post_norm": True, "post_norm_in_modulation": True},
        {"pad_odd": True},
    ],
    "test_agent_swin": [{}, {"agent_shapes": ((5, 4), (3, 3), (2, 6), (1, 1)), "img_size": 64}, {"window": 4}],
    "test_agent_pvt": [
        {},
        {"attention": "softmax", "sr_ratios": (4, 2, 1, 1)},
        {"attention": "agent", "agent_sr_ratios": (4, 2, 2, 1)},
    ],
    "test_inline_cswin": [{}, {"attention": ("softmax", "inline", "softmax", "inline")}],
    "test_agent_deit": [{}, {"global_pool": "avg"}],
    "test_tap_rvt": [{}, {"scales": None}],
    "test_tap_fan": [{}, {"scales": None}],
    "test_dhvt": [{}, {"patch_size": 4}, {"stem": "patch", "head_tokens": False, "feed_forward": "mlp"}],
    "test_dinat_s": [{}, {"attention": "softmax", "img_size": 64}],
}


def is_token_model(model: Any) -> bool:
    """As timm has it: features are tokens with a class token first, feature lists come from intermediates."""
    return model.default_cfg["pool_size"] is None


def as_map(model: Any, features: Tensor) -> Tensor:
    """The features of a square image as a map."""
    if not is_token_model(model):
        return features
    side = int((features.shape[1] - 1) ** 0.5)
    return features[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def image(batch: int = 1, size: int = 96, **options: Any) -> Tensor:
    return torch.randn(batch, options.get("in_chans", 3), size, size)


def test_import_only_adds_names_to_timm_and_warns_of_nothing() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import timm; before = set(timm.list_models());"
        "entry = {n: timm.model_entrypoint(n) for n in before}; import vision_models; after = set(timm.list_models());"
        "ours = {vision_models.models.timm_name(n) for n in vision_models.list_models()};"
        "assert before < after and after - before == ours, after ^ before;"
        "assert all(timm.model_entrypoint(n) is entry[n] for n in before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_public_names_are_there() -> None:
    assert all(hasattr(vision_models, name) for name in vision_models.__all__)


def small_and_first_of_each_family() -> list[Any]:
    """All names, the others marked slow: building 200 networks takes a minute."""
    families: set[str] = set()
    marked = []
    for name in ALL:
        family = CATALOG.entry(name).card.family
        often = name in SMALL or family not in families
        families.add(family)
        marked.append(pytest.param(name, marks=() if often else pytest.mark.slow))
    return marked


@pytest.fixture(scope="module", params=small_and_first_of_each_family())
def without_weights(request: pytest.FixtureRequest) -> Any:
    """Every model on the meta device, built once for all tests that only read its names and shapes."""
    return create_model(request.param, device="meta")


def test_config_describes_the_model(without_weights: Any) -> None:
    model = without_weights
    cfg = model.default_cfg
    keys = model.state_dict().keys()
    assert f"{cfg['first_conv']}.weight" in keys
    assert model.num_classes == cfg["num_classes"]
    if model.num_classes:
        assert f"{cfg['classifier']}.weight" in keys
        assert model.num_classes == model.get_classifier().out_features
    if not is_token_model(model):
        reduction = model.feature_info[-1]["reduction"]
        assert cfg["pool_size"] == tuple(-(-side // reduction) for side in cfg["input_size"][1:])
    reductions = [row["reduction"] for row in model.feature_info]
    assert reductions == sorted(reductions)


def test_every_parameter_is_in_a_layer_group_and_named_once(without_weights: Any) -> None:
    from timm.models import group_parameters

    model = without_weights
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = [parameter for group in groups.values() for parameter in group]
        assert sorted(grouped) == sorted(n for n, _ in model.named_parameters())
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


def test_five_axes_of_no_parameter_stand_in_the_way_of_channels_last(without_weights: Any) -> None:
    assert {name: p.ndim for name, p in without_weights.named_parameters() if p.ndim > 4} == {}


TRANSNEXT_TABLES = (
    "query_embedding",
    "relative_pos_bias_local",
    "temperature",
    "cpb_fc1.weight",
    "cpb_fc2.weight",
)


def test_layer_scales_and_position_tables_are_not_decayed() -> None:
    scaled = {"test_biformer": {"layer_scale_init_value": 0.1}, "test_focalnet": {"layerscale_value": 0.1}}
    endings = {
        "test_biformer": (".gamma1", ".gamma2"),
        "test_focalnet": (".gamma",),
        "test_ravlt": ("gamma_1", "gamma_2"),
        "test_halonet": ("_rel",),
        "test_agent_swin": ("position_bias_table",),
        "test_nat": (".rpb", ".gamma1", ".gamma2"),
        "test_mambain": (".A_log", ".ssm.D", ".gamma"),
        "test_dinat_s": (".rpb",),
        "test_spectformer": (".pos_embed",),
        "test_gfnet": (".pos_embed", ".gamma"),
        "test_agent_deit": ("pos_embed", "token"),
        "test_moh_vit": ("pos_embed", "token"),
        "test_dhvt": ("cls_token",),
        "test_tap_fan": ("cls_token",),
        "test_tap_fan_hybrid": ("cls_token",),
        "test_moh_transnext": TRANSNEXT_TABLES,
        "test_transnext": TRANSNEXT_TABLES,
        "test_sparsifiner": ("pos_embed", "cls_token"),
        "test_vit_llama": ("pos_embed", "cls_token"),
    }
    for name in SMALL:
        model: Any = create_model(name, **scaled.get(name, {}))
        expected = {p for p, _ in model.named_parameters() if p.endswith(endings.get(name, "nothing"))}
        assert bool(expected) == (name in endings)
        assert model.no_weight_decay() == expected or name in ("test_inline_swin", "test_inline_deit"), name


@pytest.mark.parametrize("name", SMALL)
def test_head_of_features_is_the_output(name: str) -> None:
    model: Any = create_model(name).eval()
    x = image()
    with torch.no_grad():
        features = model.forward_features(x)
        reduction = model.feature_info[-1]["reduction"]
        assert as_map(model, features).shape == (1, model.num_features, *(side // reduction for side in x.shape[2:]))
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = create_model(name, num_classes=42, drop_path_rate=0.0).train()
    model(image(batch=2)).mean().backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]  # others are frozen
    # A choice of keys has no gradient: what makes it learns from a loss of its own (test_sparsifiner.py).
    assert [key for key in missing if not (name == "test_sparsifiner" and ".mask_predictor." in key)] == []


@pytest.mark.parametrize("name", SMALL)
def test_classifier_can_be_replaced_or_left_out(name: str) -> None:
    model: Any = create_model(name).eval().double()
    x = image().double()
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert as_map(model, model(x)).ndim == 4
    assert as_map(model, create_model(name, num_classes=0, global_pool="").eval()(x.float())).ndim == 4
    assert next(model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (96, 128), (65, 33)])
def test_any_image_size_works(name: str, size: tuple[int, int]) -> None:
    for options in VARIATIONS.get(name, [{}]):
        out = create_model(name, **options).eval()(torch.randn(1, 3, *size))
        assert torch.isfinite(out).all(), options


@pytest.mark.parametrize("name", SMALL)
def test_constructor_arguments_reach_the_model(name: str) -> None:
    model: Any = create_model(name, in_chans=1, num_classes=3, drop_rate=0.5, drop_path_rate=0.3, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.randn(2, 1, 64, 64, dtype=torch.float64)).shape == (2, 3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert max(rates) == pytest.approx(0.3)
    assert {p.device.type for p in create_model(name, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_neither_output_nor_gradient(name: str) -> None:
    model: Any = create_model(name, drop_path_rate=0.0).double().train()
    x = image(batch=2).double()
    results = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        out = model(x)
        out.square().mean().backward()
        results.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_and_feature_lists_agree(name: str) -> None:
    model: Any = create_model(name).eval()
    x = image()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        last = model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(last, as_map(model, final))
        nhwc = model.forward_intermediates(x, indices=[1], output_fmt="NHWC", intermediates_only=True)[0]
        torch.testing.assert_close(nhwc.permute(0, 3, 1, 2), maps[1])
        early, taps = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        assert early is taps[-1] or is_token_model(model)
        # "hook" asks for the modules that "fx" asks for, by the same names
        ways = (None, "getter") if is_token_model(model) else (None, "getter", "fx", *(["hook"] * (name in OFTEN)))
        for feature_cls in ways:
            options: dict[str, Any] = {} if feature_cls is None else {"feature_cls": feature_cls}
            options |= {"out_indices": (0, 1, 2, 3)}
            features: Any = timm.create_model(timm_name(name), features_only=True, **options).eval()
            # the wrappers rename: stem_0 for stem.0, model.stem.0, graph_module.stem.0
            plain = {
                key: key.removeprefix("model.")
                .removeprefix("graph_module.")
                .replace("stem_", "stem.")
                .replace("stages_", "stages.")
                for key in features.state_dict()
            }
            model_state = model.state_dict()
            features.load_state_dict({key: model_state[name] for key, name in plain.items()})
            for ours, theirs, row in zip(maps, features(x), features.feature_info.get_dicts(), strict=True):
                torch.testing.assert_close(theirs, ours)
                assert ours.shape[1] == row["num_chs"]
                assert ours.shape[2] == -(-x.shape[2] // row["reduction"])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", SMALL)
def test_pruned_model_ends_at_the_stage_asked_for(name: str) -> None:
    model: Any = create_model(name).eval()
    x = image()
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)[1]
        assert model.prune_intermediate_layers([0, 1]) == [0, 1]
        torch.testing.assert_close(as_map(model, model(x)), expected)
    assert model.num_features == model.head_hidden_size == model.feature_info[1]["num_chs"]
    kept: Any = create_model(name).eval()
    kept.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert isinstance(kept.norm, nn.Identity)
    assert kept.num_classes == 1000


@pytest.mark.parametrize("name", SMALL)
def test_traced_graph_computes_the_same_at_every_size(name: str) -> None:
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import NodePathTracer

    model = create_model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracer = NodePathTracer(
            leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions())
        )
        graph = tracer.trace(model)
        traced = torch.fx.GraphModule(tracer.root, graph)
    with torch.no_grad():
        for size in (96, 160):
            x = image(size=size)
            torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"), [(name, o) for name in SMALL for o in VARIATIONS.get(name, [{}])], ids=str
)
def test_an_empty_batch_and_channels_last_weights_are_ordinary(name: str, options: dict[str, Any]) -> None:
    model: Any = create_model(name, num_classes=5, **options).eval()
    x = image()
    takes_none = options.get("channel_attn") != "eca"  # timm's ECA cannot reshape an empty batch
    with torch.no_grad():
        expected = model(x)
        if takes_none:
            assert model(x[:0]).shape == (0, 5)
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected, rtol=1e-4, atol=1e-5)
    if takes_none:
        model.train()(x[:0]).sum().backward()
    model(torch.cat([x, x])).sum().backward()


@pytest.mark.parametrize("name", SMALL)
def test_images_too_small_or_of_other_channels_are_refused_by_name(name: str) -> None:
    model: Any = create_model(name).eval()
    side = model.min_side
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, side, side + 5))).all()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, Y, X\), got \(1, 4, 96, 96\)"):
        model(torch.randn(1, 4, 96, 96))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, Y, X\), got \(3, 96, 96\)"):
        model(torch.randn(3, 96, 96))
    if side > 1:
        message = rf"{type(model).__name__}: image {side - 1}×50 is smaller than {side}×{side}"
        with pytest.raises(ValueError, match=message):
            model(torch.randn(1, 3, side - 1, 50))


# Two stages (of DeiT two blocks) of each family with all of its kinds of blocks: tracing costs as many seconds as there
# are blocks. Most of them only when slow tests are asked for.
SHORT: dict[str, dict[str, Any]] = {
    "test_agent_pvt": {"attention": ("agent", "softmax", "agent", "agent")},
    "test_agent_swin": {"attention": ("agent", "softmax", "agent", "agent"), "depths": (1, 2, 1, 1)},
    "test_biformer": {"topks": (4, -2, 4, -2)},
    "test_davit": {},
    "test_dhvt": {},
    "test_focalnet": {},
    "test_halonet": {},
    "test_inline_cswin": {"attention": ("inline", "softmax", "inline", "inline")},
    "test_inline_deit": {"attention": ("inline", "softmax", "inline", "inline")},
    "test_mambaout": {},
    "test_nat": {},
    "test_spectformer": {"spectral": 1},
    "test_spectformer_h": {},
    "test_tap_fan": {},
    "test_tap_rvt": {"depths": (1, 1, 1, 1)},
    "test_ravlt": {"attention": ("linear", "softmax", "linear", "softmax")},
}
OFTEN = ("test_biformer",)


def assert_one_graph_serves_all_sizes(model: Any, x: Tensor) -> None:
    """Dynamo finds no break; torch.export's program takes every batch, and every map unless the network says why."""
    with torch.no_grad():
        expected = model(x)
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        free = (0,) if model.fixed_size else (0, 2, 3)
        program = torch.export.export(model, (x,), dynamic_shapes=(dict.fromkeys(free, torch.export.Dim.AUTO),))
        for other in (x, x[:1], x.new_ones(3, 3, 150, 97).cumsum(3) / 97 if len(free) > 1 else x[:1]):
            torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in SHORT])
@pytest.mark.compile
def test_two_stages_compile_to_one_graph_that_serves_all_sizes(name: str) -> None:
    model: Any = create_model(name, **SHORT[name])
    model.prune_intermediate_layers([1])
    assert_one_graph_serves_all_sizes(model.eval(), torch.randn(2, 3, 96, 128))


@pytest.mark.parametrize("name", [name for name in SMALL if name not in SHORT])
@pytest.mark.compile
@pytest.mark.slow
def test_whole_networks_compile_to_one_graph_that_serves_all_sizes(name: str) -> None:
    assert_one_graph_serves_all_sizes(create_model(name).eval(), torch.randn(2, 3, 96, 128))


def test_a_network_that_exports_for_one_size_alone_says_why() -> None:
    reasons = {
        "biformer": "the tokens of a region are counted",
        "mambain": "one step for each token",
        "dinat_s": "memory order of the patches' map",
        "transnext": "the table of distances",
        "sparsifiner": "the keys that a query keeps are counted",
        **dict.fromkeys(("swin", "davit"), "windows are counted"),
    }
    for name in SMALL:
        reason = next((why for family, why in reasons.items() if family in name), "")
        model: Any = create_model(name, device="meta")
        assert reason in model.fixed_size, name
        assert bool(model.fixed_size) == bool(reason), name
    assert create_model("test_inline_cswin", attention="inline", device="meta").fixed_size == ""


def test_segmentation_library_takes_the_model_as_encoder() -> None:
    import segmentation_models_pytorch as smp

    unet: Any = smp.Unet("tu-test_biformer", encoder_weights=None, encoder_depth=5).eval()
    assert unet(torch.randn(1, 3, 64, 96)).shape == (1, 1, 64, 96)
