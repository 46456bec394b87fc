"""Volumes and pictures with their labels: folders in the layouts of the field, checked before anything runs."""
