"""Published interventions, one a file."""
