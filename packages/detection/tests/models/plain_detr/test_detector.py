"""Plain-DETR's claims: groups, padding, options, checkpoints.

The whole model agrees with the official code to 3e-14 in float64 (outputs, losses and gradients, padded batch).
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from detection.models import card, create_model, list_models, pretrained
from detection.models.plain_detr.detector import PlainDETR, load_backbone, load_official, our_name, sine_embedding
from detection.models.plain_detr.swin_v2 import SwinV2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(**options: Any) -> Any:
    model: Any = create_model("test_plain_detr", **options).double()
    for parameter in model.parameters():  # zeros of the initialization hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator).double() for size in ((150, 203), (180, 160))]


@pytest.mark.parametrize("reparam", [False, True])
def test_a_padded_batch_gives_each_picture_what_it_gets_alone(reparam: bool) -> None:
    model = tiny(reparam=reparam).eval()
    both, alone = model(pictures()), [model([picture])[0] for picture in pictures()]
    for together, single in zip(both, alone, strict=True):
        for key in ("boxes", "scores"):
            torch.testing.assert_close(together[key], single[key], atol=1e-9, rtol=1e-9)
    official = tiny(reparam=reparam, padding="official").eval()
    official.load_state_dict(model.state_dict())
    assert (official(pictures())[1]["scores"] - alone[1]["scores"]).abs().max() > 1e-5
    torch.testing.assert_close(official(pictures()[:1])[0]["boxes"], alone[0]["boxes"])


@pytest.mark.parametrize("reparam", [False, True])
def test_queries_that_share_objects_do_not_change_the_others(reparam: bool) -> None:
    model = tiny(reparam=reparam)
    with torch.no_grad():
        train, evaluation = model.train().outputs(pictures()), model.eval().outputs(pictures())
    assert len(train["layers_many"]) == 2
    assert evaluation["layers_many"] == []
    assert train["layers_many"][0]["pred_boxes"].shape == (2, 12, 4)
    for a, b in zip(train["layers"], evaluation["layers"], strict=True):
        torch.testing.assert_close(a["pred_logits"], b["pred_logits"], atol=1e-9, rtol=0)
        torch.testing.assert_close(a["pred_boxes"], b["pred_boxes"], atol=1e-7, rtol=0)


def test_boxes_are_refined_from_the_layer_before_and_lie_in_the_picture() -> None:
    for reparam in (False, True):
        model = tiny(reparam=reparam).eval()
        for picture, found in zip(pictures(), model(pictures()), strict=True):
            height, width = picture.shape[1:]
            if reparam:
                assert (found["boxes"] >= 0).all()
                assert (found["boxes"] <= found["boxes"].new_tensor([width, height, width, height])).all()
            assert (found["scores"].diff() <= 0).all()
    far, near = (tiny(look_forward_twice=flag).train() for flag in (True, False))
    near.load_state_dict(far.state_dict())
    for model, reached in ((far, True), (near, False)):
        output = model.outputs(pictures())["layers"][1]["pred_boxes"].sum()
        first = model.bbox_embed[0].layers[2].weight
        gradient = torch.autograd.grad(output, first, allow_unused=True)[0]
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == reached


def test_options_change_the_result() -> None:
    base = tiny().eval()
    plain = base(pictures()[:1])[0]["scores"]
    contents = [
        tiny(query_content=content).eval()(pictures()[:1])[0]["scores"] for content in ("positions", "features")
    ]
    assert not torch.allclose(*contents)
    for options in ({"position_bias": "log"}, {"proposal_size": 0.2}, {"mean": (0, 0, 0)}, {"std": (1, 1, 1)},
                    {"proposal_classes": True}):  # fmt: skip
        other = tiny(**options).eval()
        other.load_state_dict(base.state_dict())
        assert not torch.allclose(other(pictures()[:1])[0]["scores"], plain), options
    assert tiny(top_k=3).eval()(pictures())[0]["boxes"].shape == (3, 4)
    finer = tiny(upsample_stride=8, proposal_strides=(8, 16)).eval()
    assert torch.isfinite(finer(pictures())[0]["boxes"]).all()


@pytest.mark.parametrize("backbone", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_timm_backbones_give_one_map(backbone: str) -> None:
    model = PlainDETR(backbone, 3, dim=32, num_heads=2, ffn_dim=32, num_layers=1, queries=5, queries_many=0,
                      backbone_options={"stride": 16}).eval() if backbone == "resnet10t" else None  # fmt: skip
    if model is not None:
        assert model([torch.rand(3, 70, 90)])[0]["boxes"].shape == (15, 4)
        dilated = PlainDETR(backbone, 3, backbone_options={"stride": 8, "options": {"output_stride": 8}}).body
        assert (dilated.channels, dilated.stride) == (512, 8)  # the last of the three maps of this stride
    else:
        from detection.models.plain_detr.detector import TimmBackbone

        body = TimmBackbone(backbone)
        x = torch.rand(1, 3, 224, 224)
        found = body.eval()(x)
        assert found.shape == (1, body.channels, 7, 7)
        torch.testing.assert_close(found, body.body(x)[-1].permute(0, 3, 1, 2))  # timm's maps end with their channels


def test_a_vit_is_taken_whole_for_pictures_of_any_size() -> None:
    from detection.models.plain_detr.detector import TimmBackbone

    dynamic = {"dynamic_img_size": True, "dynamic_img_pad": True}
    body = TimmBackbone("test_vit", options=dynamic)
    assert len(body.body.model.blocks) == len(timm.create_model("test_vit").blocks)  # pyright: ignore[reportArgumentType]
    assert body(torch.rand(1, 3, 70, 90)).shape == (1, body.channels, 5, 6)


def test_a_vision_models_backbone_gives_one_map() -> None:
    from detection.models.plain_detr.detector import TimmBackbone

    body = TimmBackbone("test_biformer")
    assert body(torch.rand(1, 3, 64, 64)).shape[1] == body.channels


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("plain_detr_swin_v2_small_ape", 62_644_691), ("plain_detr_swin_v2_small_mim_reparam", 62_712_275)],
)
def test_released_models_have_the_official_size_and_names(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model: Any = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def official_name(ours: str) -> str:
    head, _, rest = ours.partition(".")
    if head == "body":
        return f"backbone.0.net.body.{rest}"
    if head in ("upsample", "input_proj"):
        return f"backbone.0.upsample.{rest}" if head == "upsample" else f"input_proj.0.{rest}"
    if head in ("layers", "final_layer_norm"):
        return f"transformer.decoder.{ours}"
    return ours if head in ("class_embed", "bbox_embed", "query_embed") else f"transformer.{ours}"


def test_official_names_come_back(tmp_path: Path) -> None:
    model: Any = create_model("test_plain_detr")
    state = {official_name(name): torch.randn_like(value) for name, value in model.state_dict().items()}
    assert {our_name(name) for name in state} == set(model.state_dict())
    state |= {"backbone.0.net.body.layers.0.blocks.0.attn.relative_position_index": torch.zeros(2)}
    state |= {f"transformer.decoder.{name}": value for name, value in state.items() if name.startswith("class_embed")}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    load_official(model, str(tmp_path / "official.pth"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[official_name(name)]), name
    other: Any = create_model("test_plain_detr", num_classes=3)
    with pytest.raises(ValueError, match=r"class_embed.0.bias is \(10,\), the model has \(3,\)"):
        load_official(other, state)
    load_official(other, state, ignore=("class_embed.",))
    state.pop("transformer.pos_trans.bias")
    with pytest.raises(ValueError, match=r"missing pos_trans\.bias"):
        load_official(model, {**state, "extra": torch.zeros(1)})
    (tmp_path / "bad.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a checkpoint that loads safely"):
        load_official(model, str(tmp_path / "bad.pth"))


def test_pre_trained_backbones_load_under_both_spellings() -> None:
    model: Any = create_model("test_plain_detr")
    inside = {
        k.removeprefix("body."): torch.randn_like(v) for k, v in model.state_dict().items() if k.startswith("body.")
    }
    mim = {f"encoder.{k.replace('cpb_mlp', 'rpe_mlp')}": v for k, v in inside.items()} | {
        "decoder.0.weight": torch.ones(1)
    }
    load_backbone(model, {"model": mim})
    assert torch.equal(model.body.patch_embed.proj.weight, inside["patch_embed.proj.weight"])
    with pytest.raises(ValueError, match=r"missing body\.layers"):
        load_backbone(model, {"model": {"patch_embed.norm.bias": torch.zeros(16)}})


def test_sine_embedding_interleaves_sin_and_cos() -> None:
    x = torch.tensor([[[0.3, 2.0]]], dtype=torch.float64)
    out = sine_embedding(x, 4)
    w = [1, 1, 100, 100]
    expected = [
        f(torch.tensor(2 * torch.pi * v / w[i])) for v in (0.3, 2.0) for i, f in enumerate([torch.sin, torch.cos] * 2)
    ]
    torch.testing.assert_close(out[0, 0], torch.stack(expected).double(), atol=1e-6, rtol=0)


class Flat(nn.Module):
    channels, stride = 8, 16

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 16).repeat(1, 3, 1, 1)[:, :8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "none"}, "padding must be 'exact' or 'official'"),
        ({"queries": 0}, "must be positive"),
        ({"query_content": "mixed"}, "query_content must be 'learned', 'positions' or 'features'"),
        ({"position_bias": "lin"}, "position_bias must be 'linear', 'log' or 'none'"),
        ({"match_anchors": True}, "match_anchors=True needs reparam=True"),
        ({"num_heads": 3}, "is not a multiple of num_heads=3"),
        ({"upsample_stride": 6}, "cannot be made from stride 16"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainDETR(Flat(), 3, **{"dim": 32, "num_heads": 2, "num_layers": 1, **options})


def test_wrong_backbones_targets_and_names_are_named() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'resnet5O'"):
        PlainDETR("resnet5O")
    with pytest.raises(ValueError, match="got stride=64"):
        PlainDETR("resnet10t", backbone_options={"stride": 64})
    with pytest.raises(ValueError, match="num_heads"):
        SwinV2(num_heads=(1, 2))
    model = tiny().train()
    with pytest.raises(ValueError, match="training needs one target per picture, got None"):
        model(pictures())
    with pytest.raises(ValueError, match="labels must be in 0…9, got 10…10"):
        model(pictures()[:1], [{"labels": torch.tensor([10]), "boxes": torch.tensor([[1.0, 1, 9, 9]])}])
    assert model.eval()([]) == []
    with pytest.raises(ValueError, match="did you mean 'plain_detr_resnet50'"):
        create_model("plain_detr_resnet5")
    with pytest.raises(ValueError, match="no option 'querys'; did you mean 'queries'"):
        create_model("test_plain_detr", querys=3)


def test_every_model_has_a_card() -> None:
    for name in list_models():
        assert card(name).summary
    assert card("plain_detr_swin_v2_small_mim_reparam").published == "AP 50.9"


def test_recipes_start_from_a_pre_trained_backbone(tmp_path: Path) -> None:
    source: Any = create_model("test_plain_detr")
    file = tmp_path / "backbone.pth"
    torch.save({"model": {k.removeprefix("body."): v for k, v in source.state_dict().items() if "body." in k}}, file)
    model: Any = pretrained("test_plain_detr", str(file))
    assert torch.equal(model.body.patch_embed.proj.weight, source.body.patch_embed.proj.weight)
    with pytest.raises(ValueError, match="weights are read for Plain-DETR only"):
        pretrained("test_bvr_retinanet", str(file))


def test_a_network_trains_after_a_prediction_in_inference_mode() -> None:
    from detection.models.plain_detr import swin_v2

    swin_v2._kept_index.cache_clear()
    model = tiny()
    with torch.inference_mode():
        model.eval()(pictures()[:1])
    model.train()
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[4.0, 4, 30, 30]])}]
    torch.stack(list(model(pictures()[:1], targets).values())).sum().backward()
    swin_v2._kept_index.cache_clear()
