"""What sits inside several networks: one file per idea."""
