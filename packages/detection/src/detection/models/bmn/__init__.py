"""Boundary-matching networks for events in time, with class-semantics attention."""
