"""mamba_ssm.ops over attn_core: the selective scan; its Triton functions are not provided."""

__attn_core_compat__ = True
