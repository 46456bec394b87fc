"""Which task package this is: all that the engine needs to train its recipes and to open its runs."""

from attn_core.engine import PackageId

PACKAGE = PackageId(name="vlm-tools", module="vlm_tools", default_recipe="llava_digits")
