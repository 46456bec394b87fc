"""flash_attn.bert_padding of 2.8 over torch."""

from attn_core.compat.shims.flash_attn import index_first_axis, index_put_first_axis, pad_input, unpad_input


def __getattr__(name: str) -> object:
    raise AttributeError(f"flash_attn.bert_padding.{name} is not provided by attn_core's shim")


__attn_core_compat__ = True

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]
