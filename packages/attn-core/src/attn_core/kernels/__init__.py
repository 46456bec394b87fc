"""What the operators of all folders share below their mathematics: registration, launches, tiles, the AOT gate."""
