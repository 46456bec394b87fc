"""Whole slides as bags of instance features: files, splits, training, figures and heat maps."""
