"""DeiT as a host: with softmax against timm's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_models import DeiT, create_model, load_official

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 7, "img_size": 64}


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_softmax_alone_equals_timms_deit(pool: Any) -> None:
    peer = VisionTransformer(patch_size=16, global_pool=pool, fc_norm=False, **SMALL).double().eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = load_official(DeiT(global_pool=pool, **SMALL).double(), peer.state_dict()).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for net in (model, peer):
        image = x.clone().requires_grad_()
        logits = net(image)
        wanted = [image, net.cls_token, net.pos_embed, net.norm.weight]
        results.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), wanted)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_features_are_maps_of_patches_after_blocks() -> None:
    model: Any = create_model("test_agent_deit").eval()
    x = torch.randn(1, 3, 70, 100)
    final, maps = model.forward_intermediates(x, indices=[1, 3])
    assert [tuple(level.shape) for level in maps] == [(1, 48, 4, 6)] * 2
    assert final.shape == (1, 1 + 24, 48)
    normed = model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed.flatten(2).mT, final[:, 1:])


def test_positions_of_another_image_size_are_bicubic_and_the_class_tokens_stays() -> None:
    model = DeiT(**SMALL).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 40, 100, dtype=torch.float64)
    found, grid = model.tokens(x)
    assert grid == (2, 6)
    maps = model.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=16)
    expected = (patches + F.interpolate(maps, (2, 6), mode="bicubic")).flatten(2).mT
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[:, 0], (model.cls_token + model.pos_embed[:, :1])[:, 0].expand(2, -1))


def test_only_what_lies_behind_the_last_map_is_cut_off() -> None:
    for last, kept in ((2, True), (1, False)):
        model: Any = DeiT(**SMALL)
        assert model.prune_intermediate_layers([last], prune_norm=False, prune_head=False) == [last]
        assert len(model.blocks) == last + 1
        assert isinstance(model.norm, nn.LayerNorm) == isinstance(model.head, nn.Linear) == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide embed_dim, got 5 and 192"),
        ({"img_size": 15}, "patch_size must lie in 1…15, the image's side, got patch_size=16"),
        ({"global_pool": "max"}, "global_pool must be 'token', 'avg' or '', got global_pool='max'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DeiT: {message}"):
        DeiT(**options)
