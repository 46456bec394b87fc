"""Networks that point at their input: Pointer Networks, the planar problems they solve, and the pictures of both."""
