"""One file for each verb; thin: reads options, calls the library, gives lines."""
