"""Diffusion: attention inside its pipelines, transformers that denoise, and their loss."""
