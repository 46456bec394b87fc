"""Plain-DETR, its Swin V2 backbone and its parameter groups."""
