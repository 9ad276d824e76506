"""Measurements that the README quotes. Each module prints one line of JSON; ``python -m benchmarks`` runs them all."""
