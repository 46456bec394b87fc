"""Attention backbones for vision on one attention core."""
