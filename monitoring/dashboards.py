"""The Grafana dashboards as code: ``python -m monitoring.dashboards`` writes them as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.peer import peer_dashboard
from monitoring.swarm import swarm_dashboard

FOLDER = Path(__file__).parent / "grafana" / "dashboards"


def text_of(board: Dashboard) -> str:
    return json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def files() -> dict[Path, str]:
    """Path -> what has to be there."""
    boards = {"swarm": swarm_dashboard(), "peer": peer_dashboard()}
    return {FOLDER / f"{name}.json": text_of(board) for name, board in boards.items()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
