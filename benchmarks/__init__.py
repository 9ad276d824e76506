"""Measurements that docs/log.md and docs/reliability.md quote: ``python -m benchmarks``."""
