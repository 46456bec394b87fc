"""Names of the readings, for those who choose one and need none of them yet."""

from typing import Literal, get_args

Reading = Literal["attention", "rollout", "flow", "chefer", "integrated_gradients", "occlusion"]
READINGS: tuple[Reading, ...] = get_args(Reading)
