"""How long the layers take, and their peers: ``python -m benchmarks``."""
