"""Pictures of volumes with their labels."""
