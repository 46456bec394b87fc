"""Layers that sit inside other networks, one file per idea."""
