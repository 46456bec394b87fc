"""Benchmarks of every operator beside its peers: ``python -m attn_core.bench --op attention``."""
