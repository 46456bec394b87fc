"""Attention networks for medical image segmentation: from a folder of NIfTI to masks."""
