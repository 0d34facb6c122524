"""The cases of `throughput.py`, each measured in a process of its own."""
