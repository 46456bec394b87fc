"""mamba_ssm.modules over attn_core: Mamba."""

__attn_core_compat__ = True
