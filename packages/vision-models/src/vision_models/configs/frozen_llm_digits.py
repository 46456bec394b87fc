"""A frozen layer of a language model in a small ViT on scikit-learn's 1,797 handwritten digits, trained as BiFormer is.

The layer is the last of a Llama of bytes that has only seen Python's library: ``seq-models train s2_text``, then
``--set language=runs/s2_text/step_200.safetensors``. The controls: a random frozen layer without ``--set``; a random
layer that is trained, ``--set frozen=False``; none, ``--set language_depth=0``.
Not measured yet.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base
from vision_models.models.frozen_llm import with_language

epochs = 40
language = None
language_depth = 1
frozen = True
net = dict(
    type=with_language,
    language=language,
    depth=4,
    embed_dim=64,
    num_heads=4,
    language_depth=language_depth,
    width=192,
    language_heads=6,
    hidden=528,
    frozen=frozen,
    patch_size=8,
    img_size=32,
    in_chans=1,
    num_classes=10,
    mlp_ratio=2.0,
    drop_path_rate=0.1,
)

with read_base():
    from ._digits import *
