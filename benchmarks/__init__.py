"""How long the layers and their peers take: ``python -m benchmarks``."""
