"""Frames to Altair charts, as Vega-Lite specifications.

Colours are names of CSS properties, so that the page decides them: another set in the dark, another on paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

Spec = dict[str, Any]

WIDTH, HEIGHT = 460, 260
_PANEL_WIDTH = 210
SERIES = [f"var(--series-{number})" for number in range(1, 5)]
_INK, _FAINT = "var(--ink)", "var(--faint)"

CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500},
        **{
            "domainColor": _FAINT,
            "tickColor": _FAINT,
            "gridColor": "var(--grid)",
            "labelOverlap": True,
            "labelSeparation": 6,
        },
    },
    "legend": {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "titleFontSize": 12, "orient": "top"},
    "header": {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "labelFontWeight": 500},
    "title": {"color": _INK, "fontSize": 13, "fontWeight": 500, "anchor": "start"},
    "range": {"category": SERIES},
    "rule": {"color": _INK},
    "line": {"strokeWidth": 2},
    "text": {"color": _INK},
}
"""Of every chart."""


def line(
    frame: pl.DataFrame,
    x: alt.X,
    y: alt.Y,
    *,
    color: alt.Color | alt.ColorValue | None = None,
    dash: alt.StrokeDash | None = None,
    point: bool = False,
    step: bool = False,
) -> alt.Chart:
    """Draw a line through the lines of a frame, in their order of x."""
    mark = alt.Chart(frame).mark_line(
        point=alt.OverlayMarkDef(size=36) if point else False, interpolate="step-after" if step else "linear"
    )
    channels: dict[str, Any] = {"x": x, "y": y, "color": color or alt.value(SERIES[0])}
    if dash is not None:
        channels["strokeDash"] = dash
    chart: alt.Chart = mark.encode(**channels, tooltip=[alt.Tooltip(name) for name in frame.columns])
    return chart


def sized(chart: Any, *, width: int = WIDTH, height: int = HEIGHT) -> Spec:
    """Give the specification of a chart of the usual size."""
    return spec(chart.properties(width=width, height=height))


def spec(chart: Any) -> Spec:
    """Give the specification of a chart; the page configures it."""
    body: Spec = chart.to_dict()
    body.pop("config", None)
    return body


def splits(frame: pl.DataFrame) -> Spec:
    """Draw samples of each split, by label. Frame: `split`, `label`, `samples`."""
    return sized(
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X("samples:Q", title="samples", axis=alt.Axis(format="~s")),
            y=alt.Y("split:N", sort=None, title=None),
            color=_label_color(),
            tooltip=["split", "label", alt.Tooltip("samples:Q", format=",")],
        ),
        height=120,
    )


def _label_color() -> alt.Color:
    scale = alt.Scale(domain=["click", "no click"], range=[SERIES[0], _FAINT])
    return alt.Color("label:N", title=None, scale=scale)


def frequencies(frame: pl.DataFrame, threshold: int | None) -> Spec:
    """How lookups fall with rank, one line per table, with Λ. Frame: `table`, `rank`, `lookups`."""
    log = alt.Scale(type="log", nice=False)
    top = alt.selection_point(fields=["table"], on="pointerover", empty=False)
    lines = (
        alt.Chart(frame)
        .mark_line(color=SERIES[0])
        .encode(
            x=alt.X("rank:Q", scale=log, title="rank of the row in its table", axis=_log_axis(frame["rank"])),
            y=alt.Y("lookups:Q", scale=log, title="lookups", axis=_log_axis(frame["lookups"])),
            detail="table:N",
            opacity=alt.condition(top, alt.value(1.0), alt.value(0.4)),
            strokeWidth=alt.condition(top, alt.value(3), alt.value(1.2)),
            tooltip=["table", alt.Tooltip("rank:Q", format=","), alt.Tooltip("lookups:Q", format=",")],
        )
        .add_params(top)
    )
    return sized(alt.layer(lines, *_threshold(threshold)), height=320)


def _threshold(threshold: int | None) -> list[alt.Chart]:
    """Draw a line at Λ; none where there is none, or it is 0, which a logarithmic axis has not."""
    if not threshold:
        return []
    frame = pl.DataFrame({"lookups": [threshold], "label": [f"Λ = {threshold:,}"]})
    rule = alt.Chart(frame).mark_rule(color=SERIES[1], strokeWidth=2, strokeDash=[6, 4]).encode(y="lookups:Q")
    text = alt.Chart(frame).mark_text(align="left", dx=6, dy=-8, color=SERIES[1], fontSize=13)
    return [rule, text.encode(x=alt.value(0), y="lookups:Q", text="label:N")]


def _log_axis(values: pl.Series) -> alt.Axis:
    """Lines at powers of ten only."""
    top = int(values.to_numpy().max(initial=1))
    return alt.Axis(format="~s", values=[10**power for power in range(len(str(top)))])


def hot_set_curve(frame: pl.DataFrame, chosen: pl.DataFrame) -> Spec:
    """Say what budgets buy, two panels, the chosen budget marked.

    Frames: `hot_share`, `policy`, `split`, `measure`, `share`; of the chosen one `hot_share`, `measure`, `share`.
    """
    shares = sorted({round(share, 4) for share in frame["hot_share"]})
    axis = alt.Axis(format="~%", values=shares, labelFontSize=11)
    x = alt.X("hot_share:Q", scale=alt.Scale(type="log", nice=False), title="hot rows, share of all", axis=axis)
    y = alt.Y("share:Q", title=None, axis=alt.Axis(format=".0%"), scale=alt.Scale(domain=[0, 1]))
    panels = []
    for measure in ("hit ratio", "hot samples"):
        curve = line(
            frame.filter(measure=measure),
            x,
            y,
            color=alt.Color("policy:N", title="policy", legend=alt.Legend(orient="bottom")),
            dash=alt.StrokeDash(
                "split:N",
                title="split",
                sort=["train", "val"],
                legend=alt.Legend(orient="bottom", symbolStrokeColor=_INK),
            ),
        )
        marked = chosen.filter(measure=measure)
        point = (
            alt.Chart(marked)
            .mark_point(shape="diamond", size=160, filled=True, color=_INK, opacity=1)
            .encode(x=x, y=y, tooltip=[*marked.columns])
        )
        text = (
            alt.Chart(marked)
            .mark_text(dx=-12, dy=-10, align="right", fontWeight="bold", fontSize=12)
            .encode(x=x, y=y, text="label:N")
        )
        panels.append(alt.layer(curve, point, text).properties(width=_PANEL_WIDTH, height=240, title=measure))
    return spec(alt.hconcat(*panels))


def over_steps(
    frame: pl.DataFrame, y: str, title: str, *, axis_format: str = "~g", zero: bool = False, kept: int | None = None
) -> Spec:
    """Draw a figure over the steps of training. Frame: `step` and `y`; a line marks the step whose model was kept."""
    x = alt.X("step:Q", title="step", axis=alt.Axis(format=",d", tickMinStep=1))
    scale = alt.Scale(zero=zero)
    y_axis = alt.Y(f"{y}:Q", title=title, axis=alt.Axis(format=axis_format), scale=scale)
    layers = [line(frame, x, y_axis, point=_few(frame))]
    if kept is not None:
        at = alt.Chart(pl.DataFrame({"step": [kept], "label": ["kept"]}))
        layers.append(at.mark_rule(color=SERIES[1], strokeWidth=2, strokeDash=[6, 4]).encode(x=x))
        text = at.mark_text(align="right", dx=-5, dy=8, color=SERIES[1], fontSize=13)
        layers.append(text.encode(x=x, y=alt.value(0), text="label:N"))
    return sized(alt.layer(*layers), height=200)


def bars_over_steps(frame: pl.DataFrame, y: str, title: str) -> Spec:
    """Draw counts at steps of training. Frame: `step` and `y`."""
    mark = alt.Chart(frame).mark_bar(size=max(2, min(18, WIDTH // (2 * max(frame.height, 1)))), color=SERIES[0])
    return sized(
        mark.encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(format=",d", tickMinStep=1)),
            y=alt.Y(f"{y}:Q", title=title, axis=alt.Axis(format="~s")),
            tooltip=[alt.Tooltip(name) for name in frame.columns],
        ),
        height=200,
    )


def stale_rows(frame: pl.DataFrame) -> Spec:
    """Stale and untouched rows at checks. Frame: `step`, `kind`, `rows`."""
    x = alt.X("step:Q", title="step of the check", axis=alt.Axis(format=",d", tickMinStep=1))
    y = alt.Y("rows:Q", title="hot rows", axis=alt.Axis(format="~s"), scale=alt.Scale(zero=True))
    return sized(line(frame, x, y, color=alt.Color("kind:N", title=None), point=_few(frame)), height=200)


def roc(frame: pl.DataFrame) -> Spec:
    """ROC curves of the splits, with the diagonal. Frame: `split`, `false_positive_rate`, `true_positive_rate`."""
    domain = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("false_positive_rate:Q", title="false positive rate", scale=domain)
    y = alt.Y("true_positive_rate:Q", title="true positive rate", scale=domain)
    curves = line(frame, x, y, color=alt.Color("split:N", title=None, sort=["test", "validation"]))
    return sized(alt.layer(_diagonal("false_positive_rate", "true_positive_rate"), curves), width=320, height=320)


def _diagonal(x: str, y: str, top: float = 1.0) -> alt.Chart:
    frame = pl.DataFrame({x: [0.0, top], y: [0.0, top]})
    mark = alt.Chart(frame).mark_line(color=_FAINT, strokeDash=[4, 4], strokeWidth=1.5)
    chart: alt.Chart = mark.encode(x=f"{x}:Q", y=f"{y}:Q")
    return chart


def reliability(frame: pl.DataFrame) -> Spec:
    """Mean prediction against click rate with error bars. Frame: `split` and what `reliability_bins` gives."""
    highest = pl.concat([frame["predicted"], frame["high"]]).to_numpy().max()
    top = min(1.0, 1.05 * float(highest)) or 1.0
    domain = alt.Scale(domain=[0, top], nice=False)
    x = alt.X("predicted:Q", title="mean prediction", scale=domain)
    color = alt.Color("split:N", title=None, sort=["test", "validation"])
    bars = (
        alt.Chart(frame)
        .mark_rule(strokeWidth=1.5)
        .encode(x=x, y=alt.Y("low:Q", title="click rate", scale=domain), y2="high:Q", color=color)
    )
    points = line(frame, x, alt.Y("click_rate:Q", scale=domain), color=color, point=True)
    return sized(alt.layer(_diagonal("predicted", "click_rate", top), bars, points), width=320, height=320)


def histogram(frame: pl.DataFrame) -> Spec:
    """Distribution of predictions by label, a panel per split. Frame: `split` and what `prediction_histogram` gives."""
    bars = (
        alt.Chart(frame)
        .mark_bar(opacity=0.6, binSpacing=0)
        .encode(
            x=alt.X(
                "start:Q",
                bin="binned",
                title="predicted probability",
                axis=alt.Axis(tickCount=5),
                scale=alt.Scale(domain=[0, 1]),
            ),
            x2="stop:Q",
            y=alt.Y("share:Q", stack=None, title="share of the label's samples", axis=alt.Axis(format="~%")),
            color=_label_color(),
            tooltip=["split", "label", "start", "stop", alt.Tooltip("samples:Q", format=",")],
        )
    )
    panel = bars.properties(width=_PANEL_WIDTH, height=200)
    return spec(panel.facet(column=alt.Column("split:N", title=None)))


def horizontal_bars(frame: pl.DataFrame, label: str, value: str, title: str, *, log: bool = False) -> Spec:
    """One bar per line of a frame, with its text. Frame: `label`, `value` and `text`."""
    scale = alt.Scale(type="symlog") if log else alt.Undefined
    base = alt.Chart(frame).encode(
        x=alt.X(f"{value}:Q", title=title, axis=alt.Axis(format="~s"), scale=scale),
        y=alt.Y(f"{label}:N", sort=None, title=None),
        tooltip=[label, "text"],
    )
    bars, texts = base.mark_bar(color=SERIES[0]), base.mark_text(align="left", dx=5).encode(text="text:N")
    return sized(alt.layer(bars, texts), width=WIDTH - 90, height=max(80, 34 * frame.height))


def with_errors(frame: pl.DataFrame, title: str, names: Sequence[str], *, axis_format: str, zero: bool) -> Spec:
    """Means of variants with error bars, in the order of `names`. Frame: `variant`, `mean`, `low`, `high`."""
    scale = alt.Scale(zero=zero)
    y = alt.Y("variant:N", sort=list(names), title=None, axis=alt.Axis(labelLimit=220))
    x_axis = alt.Axis(format=axis_format, tickCount=5)
    bars = (
        alt.Chart(frame)
        .mark_rule(strokeWidth=2, color=SERIES[0])
        .encode(x=alt.X("low:Q", title=title, scale=scale, axis=x_axis), x2="high:Q", y=y)
    )
    points = (
        alt.Chart(frame)
        .mark_point(filled=True, size=70, opacity=1, color=SERIES[0])
        .encode(x=alt.X("mean:Q", scale=scale, axis=x_axis), y=y, tooltip=["variant", "mean", "low", "high"])
    )
    return sized(alt.layer(bars, points), width=300, height=max(60, 28 * len(names)))


def _few(frame: pl.DataFrame) -> bool:
    """Whether points can be told apart on a line."""
    return frame.height <= 40
