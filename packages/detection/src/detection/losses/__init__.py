"""Losses of detectors."""

from .set_criterion import HybridCriterion

__all__ = ["HybridCriterion"]
