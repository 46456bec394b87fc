"""The verbs of ``vision-models``, one file each."""
