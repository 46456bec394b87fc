"""Seeded cases, one module for each operator with a function ``cases() -> list[Case]``."""

from attn_core.testing.harness import Case

from . import (
    additive_attention,
    attention,
    block_attention,
    channel_attention,
    deformable_attention,
    focal_modulation,
    group_attention,
    linear,
    linear_attention,
    linear_scan,
    merge_attention,
    neighborhood_attention,
    neighborhood_scores,
    neighborhood_values,
    selective_scan,
)

MODULES = (
    additive_attention,
    attention,
    block_attention,
    channel_attention,
    deformable_attention,
    focal_modulation,
    group_attention,
    linear,
    linear_attention,
    linear_scan,
    merge_attention,
    neighborhood_attention,
    neighborhood_scores,
    neighborhood_values,
    selective_scan,
)


def every_case() -> list[Case]:
    """The cases of all operators; the contract tests run over them."""
    return [case for module in MODULES for case in module.cases()]


def cases_of(operator: str) -> list[Case]:
    """The cases of one operator, by its name."""
    return [case for case in every_case() if case.operator.__name__ == operator]
