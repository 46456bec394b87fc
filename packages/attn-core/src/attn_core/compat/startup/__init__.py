"""What child processes load before their first line: this folder stands on their PYTHONPATH, standard library only."""
