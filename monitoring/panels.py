"""What dashboards are made of: panels, rows, variables, annotations, on Prometheus."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries, xychart
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    DataSourceRef,
    LegendDisplayMode,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    DataTransformerConfig,
    DynamicConfigValue,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.dashboard import Panel as BuiltPanel
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.xychart import SeriesMapping, XYShowMode

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
GRAFANA = "12.2.0"
"""Whose options ours are; options that do not say it are taken for an old panel's and rewritten."""
TAG = "p2p-diloco"
NATS = "suffix:nats"
STEPS = "suffix:steps"
PEERS = "suffix:peers"
COUNTS = (PEERS, STEPS, "percentunit", "short")
"""Units of what is often 0 all the time; the axis then ends at 1."""
RECENT = "[$__rate_interval]"
"""For ``rate``: some scrapes."""

Panel: TypeAlias = timeseries.Panel | stat.Panel | table.Panel | xychart.Panel


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Column:
    title: str
    expr: str
    unit: str


def lines(title: str, text: str, unit: str, *queries: Query, width: int = 8, stacked: bool = False) -> timeseries.Panel:
    """Against time. ``text``: what it shows, for whoever points at the title; ``width``: of 24."""
    panel = timeseries.Panel().title(title).description(text).datasource(SOURCE).unit(unit).span(width).height(8)
    panel.show_points(VisibilityMode.NEVER).fill_opacity(40 if stacked else 0)
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)).axis_soft_min(0).legend(legend())
    if unit in COUNTS:
        panel.axis_soft_max(1)
    if unit in (PEERS, STEPS):
        panel.decimals(0)
    if stacked:
        panel.min(0).stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    for query, ref_id in zip(queries, "ABCD"):
        panel.with_target(range_query(query, ref_id))
    return panel


def perplexity(text: str, training: str, held_out: str) -> timeseries.Panel:
    """On a logarithmic axis, since it begins near the size of the vocabulary. ``training``, ``held_out``: losses."""
    queries = Query(f"exp({held_out})", "held-out"), Query(f"exp({training})", "training")
    axis = common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(2)
    return lines("Perplexity", text, "none", *queries, width=6).scale_distribution(axis).axis_soft_min(1)


def legend() -> common.VizLegendOptions:
    return common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST).calcs([])


def figure(title: str, text: str, unit: str, expr: str) -> stat.Panel:
    """One number now."""
    panel = stat.Panel().title(title).description(text).datasource(SOURCE).unit(unit).span(4).height(4)
    panel.graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(prometheus.Dataquery().expr(expr).ref_id("A").datasource(SOURCE).instant())


def curve(title: str, text: str, unit: str, *pairs: tuple[Query, Query], width: int = 12) -> xychart.Panel:
    """``pairs``: what stands on the axes x and y, for each line. Scraped at the same time, they are one point."""
    panel = xychart.Panel().title(title).description(text).datasource(SOURCE).unit(unit).span(width).height(8)
    panel.show(XYShowMode.POINTS_AND_LINES).mapping(SeriesMapping.MANUAL).legend(legend())
    for query, ref_id in zip([query for pair in pairs for query in pair], "ABCD"):
        panel.with_target(range_query(query, ref_id))
    panel.with_transformation(DataTransformerConfig(id_val="joinByField", options={"byField": "Time", "mode": "outer"}))
    panel.override_by_regexp(".*outer step.*", [DynamicConfigValue(id_val="unit", value="none")])
    return panel.series([line_of(x.legend, y.legend) for x, y in pairs])


def line_of(x: str, y: str) -> xychart.XYSeriesConfig:
    line = xychart.XYSeriesConfig().name(xychart.XychartXYSeriesConfigName().fixed(y))
    line.frame(xychart.XychartXYSeriesConfigFrame().matcher(xychart.MatcherConfig().id("byIndex").options(0)))
    line.x(xychart.XychartXYSeriesConfigX().matcher(xychart.MatcherConfig().id("byName").options(x)))
    return line.y(xychart.XychartXYSeriesConfigY().matcher(xychart.MatcherConfig().id("byName").options(y)))


def rows(title: str, text: str, key: str, labels: Sequence[str], info: str, columns: Sequence[Column]) -> table.Panel:
    """Now, one row for each value of the label ``key``: ``labels`` of the series ``info``, then ``columns``."""
    panel = table.Panel().title(title).description(text).datasource(SOURCE).unit("short").span(24).height(9)
    exprs = [f"max by ({', '.join([key, *labels])}) ({info})", *(f"max by ({key}) ({c.expr})" for c in columns)]
    for expr, ref_id in zip(exprs, "ABCDEFGH"):
        query = prometheus.Dataquery().expr(expr).ref_id(ref_id).datasource(SOURCE).instant()
        panel.with_target(query.format(PromQueryFormat.TABLE))
    values = {f"Value #{ref_id}": column for column, ref_id in zip(columns, "BCDEFGH")}
    shown = [*labels, *values]
    for id_val, options in (
        ("joinByField", {"byField": key, "mode": "outer"}),
        ("filterFieldsByName", {"include": {"names": shown}}),
        (
            "organize",
            {
                "indexByName": {name: index for index, name in enumerate(shown)},
                "renameByName": {name: column.title for name, column in values.items()},
            },
        ),
    ):
        panel.with_transformation(DataTransformerConfig(id_val=id_val, options=options))
    for column in columns:
        panel.override_by_name(column.title, [DynamicConfigValue(id_val="unit", value=column.unit)])
    return panel


def range_query(query: Query, ref_id: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref_id).datasource(SOURCE).range()


def phases(rate_of: str) -> Query:
    """Mean seconds of each phase. ``rate_of``: PromQL in which NAME stands for the series' name."""
    seconds, rounds = (rate_of.replace("NAME", f"round_phase_seconds_{part}") for part in ("sum", "count"))
    return Query(f"sum by (phase) ({seconds}) / (sum by (phase) ({rounds}) > 0)", "{{phase}}")


def blank(title: str, uid: str, text: str) -> dashboard.Dashboard:
    board = dashboard.Dashboard(f"p2p-diloco: {title}").uid(uid).description(text).tags([TAG]).readonly()
    board.time("now-1h", "now").refresh("10s").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    link = dashboard.DashboardLink("p2p-diloco").type(DashboardLinkType.DASHBOARDS).tags([TAG]).keep_time(True)
    board.link(link.icon("external link").include_vars(True))
    return board.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    return variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)


def event(name: str, color: str, expr: str, text: str) -> dashboard.AnnotationQuery:
    annotation = dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color)
    return annotation.expr(expr).step("60s").title_format(text)


def finished(board: dashboard.Dashboard, panels: Mapping[str, Sequence[Panel]]) -> Dashboard:
    """With one row of panels after the other, all with an id."""
    ids = itertools.count(1)
    for title, row in panels.items():
        board.with_row(dashboard.Row(title).id(next(ids)))
        for panel in row:
            board.with_panel(panel.id(next(ids)))
    built = board.build()
    for one in built.panels or []:
        if isinstance(one, BuiltPanel):
            one.plugin_version = GRAFANA
    return built
