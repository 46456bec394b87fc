"""What the engine trains."""
