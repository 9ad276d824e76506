"""Prometheus and Grafana for a swarm: configuration, rules, and the dashboards as code."""
