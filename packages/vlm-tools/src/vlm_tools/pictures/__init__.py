"""Heat maps as pictures and pages."""
