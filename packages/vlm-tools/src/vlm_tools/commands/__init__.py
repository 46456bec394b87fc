"""The verbs of ``vlm-tools``, one a file: options in, lines out; the library does the work."""
