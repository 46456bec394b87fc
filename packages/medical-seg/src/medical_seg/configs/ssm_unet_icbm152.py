"""VM-UNet's U of any state-space block, three small stages, on axial planes of the ICBM152 average brain: T1 → CSF,
grey and white matter.

``--set network=ssm_unet:umamba``, ``ssm_unet:windowed``, … A demonstration: one brain, no benchmark. Training sees
planes of the back of the head, the test is the front. 3-means, which is given the brain: 0.745, 0.916, 0.955.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base

network = "ssm_unet:ss2d"
options = dict(width=24, depths=(1, 1, 1), depths_up=(1, 1, 1), states=8, drop_path=0.0)
window = (1, 32, 96)
steps = 300
batch_size = 8
learning_rate = 3e-3

with read_base():
    from ._icbm152_planes import *
