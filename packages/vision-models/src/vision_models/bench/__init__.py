"""Peers of our models in the formulation of their official code, and what measures both in one run."""
