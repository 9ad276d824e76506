"""The dashboards as Grafana gets them: what is committed is what the code says, and is laid out as it should be."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grafana_foundation_sdk", reason="needs Python 3.11")

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.dashboards import FOLDER, files

PATHS = sorted(FOLDER.glob("*.json"))
Panels = list[dict[str, Any]]


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    path: Path = request.param
    board: dict[str, Any] = json.loads(path.read_text())
    return board


def panels_of(board: dict[str, Any]) -> Panels:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_committed_is_what_the_code_says() -> None:
    assert {path: path.read_text() for path in PATHS} == files(), "run: python -m monitoring.dashboards"


def test_the_sdk_reads_what_it_has_written(board: dict[str, Any]) -> None:
    register_default_plugins()
    assert json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)) == board


def test_names_and_ids_are_fixed() -> None:
    boards = [json.loads(path.read_text()) for path in PATHS]
    assert {board["uid"]: board["title"] for board in boards} == {
        "p2p-diloco-peer": "p2p-diloco: Peer",
        "p2p-diloco-swarm": "p2p-diloco: Swarm",
    }
    for board in boards:
        ids = [panel["id"] for panel in board["panels"]]
        assert sorted(ids) == list(range(1, len(ids) + 1))


def test_every_panel_says_what_it_is(board: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in panels_of(board)]
    assert len(set(titles)) == len(titles)
    for panel in panels_of(board):
        assert panel["title"]
        assert "New panel" not in panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        if panel["type"] in ("timeseries", "xychart"):
            assert panel["options"]["legend"]["showLegend"]


def test_the_data_source_can_be_chosen(board: dict[str, Any]) -> None:
    first = board["templating"]["list"][0]
    assert (first["type"], first["name"], first["query"]) == ("datasource", "datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels_of(board):
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
    others = [*board["templating"]["list"][1:], *board.get("annotations", {}).get("list", [])]
    assert all(other["datasource"] == chosen for other in others)


def test_rows_are_full_and_nothing_overlaps(board: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in board["panels"]]
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
    for y in {place["y"] for place in places}:
        assert sum(place["w"] for place in places if place["y"] == y) == 24


def test_a_curve_finds_its_fields(board: dict[str, Any]) -> None:
    """Grafana's XY chart draws no series whose frame is not named, and rewrites options of a version that is not."""
    (version,) = {panel["pluginVersion"] for panel in panels_of(board)}
    assert f"image: grafana/grafana:{version}\n" in (FOLDER.parents[1] / "compose.yaml").read_text()
    curves = [panel for panel in panels_of(board) if panel["type"] == "xychart"]
    assert curves
    for panel in curves:
        assert [one["id"] for one in panel["transformations"]] == ["joinByField"], "of all queries one frame is made"
        named = {target["legendFormat"] for target in panel["targets"]}
        for line in panel["options"]["series"]:
            assert line["frame"]["matcher"] == {"id": "byIndex", "options": 0}
            assert {line[axis]["matcher"]["options"] for axis in "xy"} <= named
