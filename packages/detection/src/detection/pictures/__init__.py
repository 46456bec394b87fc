"""What is drawn: boxes in pictures, boxes in space."""
