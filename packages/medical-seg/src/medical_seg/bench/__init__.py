"""Measurements behind ``medical-seg benchmark``."""
