"""Official code over attn_core's operators, unmodified: stand-ins for the compiled extensions that it imports.

:func:`provide` puts shims in place, :func:`legacy` repairs what else stops old code; both by name, never by default.
``python -m attn_core.compat run --provide msda script.py`` does so for a whole process and its children,
``python -m attn_core.compat doctor FOLDER`` says what a repository needs. :func:`transformers_attention` brings
:func:`attn_core.attention` into the models of Hugging Face. ``import attn_core`` loads nothing of it.
"""

from .startup.attn_core_repairs import REPAIRS, Legacy, Repair, legacy
from .startup.attn_core_shims import SHIMS, InstalledError, Provided, Shim, provide
from .transformers_attention import transformers_attention

__all__ = [
    "REPAIRS",
    "SHIMS",
    "InstalledError",
    "Legacy",
    "Provided",
    "Repair",
    "Shim",
    "legacy",
    "provide",
    "transformers_attention",
]
