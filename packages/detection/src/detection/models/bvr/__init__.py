"""BVR (RelationNet++): the head, and the detectors that it enhances."""
