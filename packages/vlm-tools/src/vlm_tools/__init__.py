"""See and repair what a vision-language model looks at."""
