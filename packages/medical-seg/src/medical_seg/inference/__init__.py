"""Whole volumes through a network in bounded memory."""
