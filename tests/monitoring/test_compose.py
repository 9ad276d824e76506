"""What ``monitoring/compose.yaml`` mounts is there, and Prometheus and Grafana look for it where it is mounted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import monitoring

FOLDER = Path(monitoring.__file__).parent
PROVISIONING = FOLDER / "grafana/provisioning"


def parsed(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


COMPOSE = parsed(FOLDER / "compose.yaml")
PROMETHEUS, GRAFANA = (COMPOSE["services"][name] for name in ("prometheus", "grafana"))


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Path in the container -> what is mounted there: a path, or a named volume."""
    pairs = (volume.split(":")[:2] for volume in service["volumes"])
    return {target: source for source, target in pairs}


def here(service: dict[str, Any], path: str) -> Path:
    """The file in this repository that a container finds at ``path``."""
    target = next(target for target in mounts(service) if Path(path).is_relative_to(target))
    return FOLDER / mounts(service)[target] / Path(path).relative_to(target)


def option(name: str) -> str:
    """Of Prometheus's command."""
    (value,) = (word.partition("=")[2] for word in PROMETHEUS["command"] if word.startswith(f"--{name}="))
    return str(value)


def test_all_that_is_mounted_is_there() -> None:
    for service in (PROMETHEUS, GRAFANA):
        for source in mounts(service).values():
            assert (FOLDER / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"]


def test_prometheus_finds_configuration_and_rules() -> None:
    path = here(PROMETHEUS, option("config.file"))
    assert [name for name in parsed(path)["rule_files"] if not (path.parent / name).is_file()] == []
    assert mounts(PROMETHEUS)[option("storage.tsdb.path")] in COMPOSE["volumes"]


def test_grafana_finds_dashboards_and_data_source() -> None:
    assert here(GRAFANA, "/etc/grafana/provisioning") == PROVISIONING  # where its image looks
    (provider,) = parsed(PROVISIONING / "dashboards/p2p-diloco.yaml")["providers"]
    dashboards = here(GRAFANA, provider["options"]["path"])
    assert {path.name for path in dashboards.iterdir()} == {"peer.json", "swarm.json"}
    home = GRAFANA["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert here(GRAFANA, home) == dashboards / "swarm.json"
    (source,) = parsed(PROVISIONING / "datasources/prometheus.yaml")["datasources"]
    assert source["url"] == f"http://{option('web.listen-address')}"
    every = parsed(FOLDER / "prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == every
