"""Frozen language layers against a plain network over the official names, and layers of transformers' own decoders."""

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import create_model, load_official
from vision_models.models.frozen_llm import (
    KEY_MAP,
    FrozenLLM,
    LanguageBlock,
    LlamaLayer,
    append_language,
    language_of,
    load_language,
    with_language,
)

SMALL: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 12,
    "num_heads": 2,
    "width": 16,
    "language_heads": 4,
    "hidden": 20,
    "img_size": 16,
    "patch_size": 8,
    "num_classes": 5,
}
LLAMA_7B_LAYER = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
DEIT = {"tiny": (5_717_416, 192), "small": (22_050_664, 384), "base": (86_567_656, 768)}


def network(**options: Any) -> FrozenLLM:
    net = FrozenLLM(**{**SMALL, **options}).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


class Plain:
    """The network as its official names spell it; a loop over heads, an explicit softmax, norms by hand."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.state[f"{name}.weight"].T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.weight"]
            + (self.state[f"{name}.bias"])
        )

    def rms(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5 * self.state[f"{name}.weight"]

    @staticmethod
    def mixed(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        parts = []
        for one, two, three in zip(q.chunk(heads, 2), k.chunk(heads, 2), v.chunk(heads, 2), strict=True):
            scores = (one @ two.mT / one.shape[2] ** 0.5).exp()
            parts.append(scores / scores.sum(2, keepdim=True) @ three)
        return torch.cat(parts, 2)

    def llama(self, x: Tensor, name: str, heads: int) -> Tensor:
        y = self.rms(x, f"{name}.attention_norm")
        q, k, v = (self.linear(y, f"{name}.attention.{w}") for w in ("wq", "wk", "wv"))
        x = x + self.linear(self.mixed(q, k, v, heads), f"{name}.attention.wo")
        y = self.rms(x, f"{name}.ffn_norm")
        gate = self.linear(y, f"{name}.feed_forward.w1")
        gate = gate / (1 + (-gate).exp()) * self.linear(y, f"{name}.feed_forward.w3")
        return x + self.linear(gate, f"{name}.feed_forward.w2")

    def __call__(self, image: Tensor, *, layers: int = 1, pool: str = "token") -> Tensor:
        x = F.conv2d(image, self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"], 8)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.state["cls_token"].expand(len(image), -1, -1), x.flatten(2).mT], 1)
        table = self.state["pos_embed"]
        if grid != (2, 2):
            cells = F.interpolate(table[:, 1:].mT.reshape(1, -1, 2, 2), size=grid, mode="bicubic")
            table = torch.cat([table[:, :1], cells.flatten(2).mT], 1)
        x = x + table
        for name in ("blocks.0", "blocks.1"):
            q, k, v = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, 2)
            x = x + self.linear(self.mixed(q, k, v, 2), f"{name}.attn.proj")
            y = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
            x = x + self.linear(0.5 * y * (1 + torch.erf(y / 2**0.5)), f"{name}.mlp.fc2")
        if layers:
            x = self.linear(x, "llama_dim_mapper1")
            for i in range(layers):
                x = self.llama(x, f"llama.layers.{i}", 4)
            x = self.linear(self.rms(x, "llama.norm"), "llama_dim_mapper2")
        x = self.norm(x, "norm")
        return self.linear(x[:, 0] if pool == "token" else x[:, 1:].sum(1) / (x.shape[1] - 1), "head")


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {}),
        ({"language_depth": 2, "global_pool": "avg", "frozen": False}, {"layers": 2, "pool": "avg"}),
        ({"language_depth": 0, "qkv_bias": False}, {"layers": 0}),
    ],
    ids=["one", "two", "none"],
)
def test_logits_and_gradients_equal_a_plain_network(options: dict[str, Any], how: dict[str, Any]) -> None:
    net = network(**options)
    names = official_names(net, KEY_MAP["llama"])
    own = dict(net.named_parameters())
    image = torch.randn(3, 3, 16, 29 if not options else 16, dtype=torch.float64)
    expected = Plain({official: own[ours] for official, ours in names.items()})(image, **how)
    logits = net(image)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(logits)
    trained = [p for p in own.values() if p.requires_grad]
    ours, plain = (torch.autograd.grad((out * weight).sum(), trained) for out in (logits, expected))
    torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("size", DEIT)
def test_parameters_are_those_of_deit_a_layer_of_llama_7b_and_two_linear_layers(size: str) -> None:
    net = create_model(f"vit_llama_{size}", device="meta")
    host, width = DEIT[size]
    trained = host + 2 * width * 4096
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in net.parameters()) == trained + LLAMA_7B_LAYER + 4096
    assert sum(p.numel() for p in FrozenLLM(language_depth=0, device="meta").parameters()) == DEIT["tiny"][0]


def test_official_names_make_a_round_trip() -> None:
    net = network(language_depth=2)
    names = official_names(net, KEY_MAP["llama"])
    assert {
        "llama.layers.0.attention.wq.weight",
        "llama.layers.1.feed_forward.w3.weight",
        "llama.layers.0.ffn_norm.weight",
        "llama.norm.weight",
        "llama_dim_mapper1.weight",
        "llama_dim_mapper2.weight",
        "blocks.1.attn.qkv.weight",
        "norm.bias",
    } <= set(names)
    state = {official: net.state_dict()[ours] for official, ours in names.items()}
    loaded = load_official(FrozenLLM(**SMALL, language_depth=2).double(), {"model": state})
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_step_moves_the_host_and_the_linear_layers_and_leaves_the_frozen_ones() -> None:
    for frozen in (True, False):
        net = FrozenLLM(**SMALL, frozen=frozen)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
        net(torch.randn(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        still = {name for name, value in net.state_dict().items() if torch.equal(value, before[name])}
        language = {name for name in before if ".layers." in name or name == "blocks.2.norm.weight"}
        assert len(language) == 10
        assert still == (language if frozen else set())


def layer_of_llama(width: int = 16, heads: int = 4, kv_heads: int = 4, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=width,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def test_layers_of_a_checkpoint_compute_what_the_decoder_of_transformers_does_with_every_token_at_place_0() -> None:
    llama = layer_of_llama()
    net = load_language(network(), llama.state_dict())
    block = net.blocks[-1]
    assert isinstance(block, LanguageBlock)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    decoder = llama.model
    there = decoder.layers[1](
        x, attention_mask=mask, position_embeddings=decoder.rotary_emb(x, torch.zeros(1, 5, dtype=torch.long))
    )
    # transformers takes its norms in float32
    torch.testing.assert_close(block.layers[0](x), there, rtol=1e-5, atol=5e-6)
    both = load_language(network(language_depth=2), {f"net.{n}": v for n, v in llama.state_dict().items()})
    torch.testing.assert_close(both.blocks[-1].layers[1].state_dict(), block.layers[0].state_dict())  # type: ignore[union-attr, index]
    meta = {f"layers.31.{n}": v for n, v in block.layers[0].state_dict().items()}
    again = load_language(network(), meta).blocks[-1].layers[0].state_dict()  # type: ignore[union-attr, index]
    torch.testing.assert_close(again, block.layers[0].state_dict())
    assert not torch.equal(network().blocks[-1].norm.weight, block.norm.weight)  # type: ignore[arg-type]  stays its own


def test_the_order_of_rows_that_rotation_needs_cancels() -> None:
    """Meta's rows of queries and keys are pairs, those of transformers halves."""
    layer: Any = LlamaLayer(16, 4, 20).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        for weight in (layer.attention.wq.weight, layer.attention.wk.weight):
            weight.copy_(weight.view(4, 2, 2, 16).transpose(1, 2).reshape(16, 16))
    torch.testing.assert_close(layer(x), before)


def decoders() -> dict[str, Any]:
    from transformers import GPT2Config, GPT2Model, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    opt = OPTConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=16
    )
    qwen = Qwen2Config(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return {
        "llama": layer_of_llama(kv_heads=2),
        "opt": OPTForCausalLM(opt).double(),
        "qwen": Qwen2Model(qwen).double(),
        "gpt2": GPT2Model(GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=4)).double(),
    }


def test_any_decoder_of_transformers_sees_tokens_without_order_unless_told() -> None:
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for name, model in decoders().items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        block = language_of(model, 12, depth=2)
        out = block(x)
        assert out.shape == x.shape
        torch.testing.assert_close(block(x[:, order]), out[:, order], msg=name)
        moved = x.clone()
        moved[:, -1] += 1
        causal = language_of(model, 12, causal=True)
        torch.testing.assert_close(causal(moved)[:, :-1], causal(x)[:, :-1], msg=name)
        free = language_of(model, 12)
        assert (free(moved) - free(x))[:, 0].abs().max() > 1e-6, name
        placed = language_of(model, 12, positions=True)
        placed.load_state_dict(free.state_dict())
        assert torch.allclose(placed(x), free(x)) == (name in ("opt", "gpt2")), name  # these place tokens at the input
        assert not any(p.requires_grad for p in block.layers.parameters())
        assert all(p.requires_grad for p in model.parameters())
        assert all(p.requires_grad for p in language_of(model, 12, frozen=False).parameters())


def test_causal_rotated_layers_of_transformers_are_the_decoder_s_own() -> None:
    llama = layer_of_llama(layers=1).model
    block = language_of(llama, 16, positions=True, causal=True)
    with torch.no_grad():
        block.mapper_in.weight.copy_(torch.eye(16))
        block.mapper_out.weight.copy_(torch.eye(16))
        block.norm.weight.copy_(llama.norm.weight)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = llama(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=5e-6)  # its norms are taken in float32


def test_frozen_layers_drop_nothing_in_training() -> None:
    opt = decoders()["opt"]
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    block = language_of(opt, 12).train()
    assert torch.equal(block(x), block(x))
    trained = language_of(opt, 12, frozen=False).train()
    assert not torch.equal(trained(x), trained(x))
    assert block.eval().train().mapper_in.training


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"],
)
def test_vision_transformers_of_timm_take_a_language_block(name: str) -> None:
    vit: Any = timm.create_model(name, num_classes=3, depth=1, embed_dim=48, num_heads=3, img_size=56)
    size = (56, 56)
    levels = len(vit.feature_info)
    block = LanguageBlock(vit.embed_dim, [LlamaLayer(16, 4, 20)], 16)
    append_language(vit.eval(), block)
    image = torch.randn(2, 3, *size)
    out = vit(image)
    assert out.shape == (2, 3)
    with torch.no_grad():
        block.mapper_out.weight.zero_()
    assert (vit(image) - out).abs().max() > 0
    assert torch.equal(vit(image)[0], vit(image)[1])  # nothing goes around the language layers
    last = vit.forward_intermediates(image, indices=[levels], norm=False, intermediates_only=True)[0]
    assert last.abs().max() == 0


def test_a_batch_of_none_and_every_dtype_work() -> None:
    net = FrozenLLM(**SMALL).eval()
    assert net(torch.randn(0, 3, 16, 16)).shape == (0, 5)
    image = torch.randn(1, 3, 19, 27)
    exact = net.double()(image.double())
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        out = net.to(dtype)(image.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound)


def test_what_does_not_fit_is_named() -> None:
    for options, message in (
        ({"language_depth": -1}, "FrozenLLM: language_depth must be at least 0, got language_depth=-1"),
        ({"language_heads": 3}, "FrozenLLM: language_heads must divide width=16, got language_heads=3"),
        ({"hidden": 0}, "FrozenLLM: hidden must be at least 1, got hidden=0"),
    ):
        with pytest.raises(ValueError, match=message):
            FrozenLLM(**{**SMALL, **options})
    block = LanguageBlock(13, [LlamaLayer(16, 4)], 16)
    assert block.layers[0].feed_forward.w1.out_features == 256  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="append_language: model must keep its tokens between blocks, got a ResNet"):
        append_language(timm.create_model("test_resnet"), block)
    with pytest.raises(ValueError, match=r"append_language: block must have dim=12 of the model, got dim=13"):
        append_language(FrozenLLM(**SMALL), block)
    with pytest.raises(ValueError, match="LanguageBlock: attn_mask must be None"):
        block(torch.zeros(1, 2, 13), attn_mask=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="language_of: language must have decoder layers, got a Linear"):
        language_of(nn.Linear(2, 2), 12)
    with pytest.raises(ValueError, match="language_of: depth must be from 1 to 2, the decoder's layers, got depth=3"):
        language_of(layer_of_llama(), 12, depth=3)
    with pytest.raises(ValueError, match="load_language: the model has no language layers"):
        load_language(FrozenLLM(**{**SMALL, "language_depth": 0}), {})
    with pytest.raises(ValueError, match="load_language: the given dict holds 2 layers of Llama, the model needs 3"):
        load_language(network(language_depth=3), layer_of_llama().state_dict())
    with pytest.raises(ValueError, match=r"load_language: the given dict does not fit this ModuleList: .*attention.wk"):
        load_language(network(), layer_of_llama(kv_heads=2).state_dict())


def test_a_recipe_names_the_file_of_the_language_layers(tmp_path: Any) -> None:
    llama = layer_of_llama()
    torch.save(llama.state_dict(), tmp_path / "llama.pth")
    net = with_language(str(tmp_path / "llama.pth"), **SMALL)
    torch.testing.assert_close(
        net.blocks[-1].layers[0].feed_forward.w2.weight,  # type: ignore[union-attr, index]
        llama.model.layers[1].mlp.down_proj.weight.float(),
    )
    assert isinstance(with_language(**SMALL), FrozenLLM)
