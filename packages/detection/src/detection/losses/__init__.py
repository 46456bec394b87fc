"""Losses of detectors."""

from detection.losses.set_criterion import HybridCriterion

__all__ = ["HybridCriterion"]
