"""Attention inside diffusion pipelines."""
