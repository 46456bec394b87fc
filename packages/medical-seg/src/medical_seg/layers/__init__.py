"""Layers that sit inside networks."""
