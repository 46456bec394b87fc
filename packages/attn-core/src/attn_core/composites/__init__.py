"""Attention of published models, composed of the operators: one file each, without kernels of their own."""
