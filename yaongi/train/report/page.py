"""`report.html`: one page about a run, or about several beside each other, without any other file."""

import html
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from yaongi.pictures import STYLE, svg
from yaongi.train.report.curves import Curves, Panel
from yaongi.train.report.kernels import kernel_panels
from yaongi.train.report.run import Run
from yaongi.train.report.tables import bits_table, facts_table, samples, settings, sources_table
from yaongi.train.report.words import Language, translate
from yaongi.train.run_folder import REPORT

SIZE = 4.4, 2.8  # inches of a panel: its text has the page's size where a panel is some 400 pixels wide
SVG_STYLE = STYLE | {"font.size": 9, "legend.fontsize": 7.5, "legend.framealpha": 0.7, "axes.titlesize": 9}
CSS = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:1.5em auto;padding:0 16px;color:#222;background:#fafafa}
h1{margin:0 0 .4em}h2{margin:1.6em 0 .5em;font-size:1.2em}h3{margin:0 0 .2em;font-size:.95em}.grid+h3{margin-top:1em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:12px}
.card{background:#fff;border:1px solid #e3e3e3;border-radius:8px;padding:10px 12px;min-width:0;overflow-x:auto}
svg{display:block;width:100%;height:auto}svg text{font-family:system-ui,sans-serif!important}
svg image{image-rendering:pixelated}
table{border-collapse:collapse;font-size:.93em}th,td{text-align:left;vertical-align:top;padding:.15em 1.1em .15em 0}
th{font-weight:600}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
thead th{border-bottom:1px solid #bbb}
td{overflow-wrap:anywhere}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:.86em}
details summary{cursor:pointer;color:#555}.note{color:#777}
.switch input{position:absolute;opacity:0}.switch label{padding:0 .6em;border-radius:4px;cursor:pointer;color:#555}
.switch input:checked+label{background:#e4ecf7;color:#123}.switch input:focus-visible+label{outline:2px solid #48c}
.switch>div{display:none}
#axis0:checked~.axis0,#axis1:checked~.axis1,#axis2:checked~.axis2{display:block}
"""


def write_report(
    folders: Sequence[Path],
    out: Path | None = None,
    benchmarks: Path | None = None,
    language: Language = "en",
    refresh: int = 0,
) -> Path:
    """Write a page about the runs in `folders`.

    Args:
        out: the page; None: `report.html` in the first folder.
        benchmarks: JSON file of `pytest benchmarks/ --benchmark-json`; adds two panels on the kernels.
        refresh: seconds after which a browser loads the page again; 0: never.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no `metrics.jsonl`, or no benchmark file.
        ValueError: no step was recorded.
    """
    runs = [Run.read(folder) for folder in folders]
    more = [] if benchmarks is None else kernel_panels(benchmarks, language)
    page = _page(runs, more, language, refresh)
    path = out or folders[0] / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _page(runs: Sequence[Run], more: Sequence[Panel], language: Language, refresh: int) -> str:
    def say(text: str) -> str:
        return html.escape(translate(text, language))

    matplotlib.use("Agg")
    curves = Curves(runs, language)
    with matplotlib.rc_context(SVG_STYLE):
        loss = _switch([(name, panel.title, _drawn(panel)) for name, panel in curves.losses()])
        cards = "".join(_card(panel.title, _drawn(panel)) for panel in (*curves.panels(), *more))
    title = html.escape(", ".join(run.name for run in runs))
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    heading = say("the run's curves")
    parts = [
        f'<!doctype html><html lang="{language}"><head><meta charset="utf-8">{again}',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{title}</title><style>{CSS}</style></head><body><h1>{title}</h1>",
        f'<div class="card">{facts_table(runs, language)}</div>',
        f'<h2>{heading}</h2><div class="grid">{loss}{cards}</div>',
        f"<h2>{say('bits per byte of held-out text')}</h2>",
        f'<div class="grid">{"".join(_card(run.name, bits_table(run, language)) for run in runs)}</div>',
        f"<h2>{say('Samples')}</h2>{samples(runs, language)}",
        f'<h2>{say("Text")}</h2><div class="card">{sources_table(runs[0], language)}</div>',
        f'<h2>{say("Settings")}</h2><div class="card">{settings(runs, language)}</div></body></html>',
    ]
    return "\n".join(parts)


def _drawn(panel: Panel) -> str:
    figure = Figure(figsize=SIZE, layout="constrained")
    panel.draw(figure.subplots())
    return svg(figure)


def _card(title: str, content: str) -> str:
    return f'<div class="card"><h3>{html.escape(title)}</h3>{content}</div>'


def _switch(variants: Sequence[tuple[str, str, str]]) -> str:
    """Return a card with one of several pictures, chosen by a button; it needs no script."""
    buttons = "".join(
        f'<input type="radio" name="axis" id="axis{i}"{" checked" * (i == 0)}><label for="axis{i}">{html.escape(name)}'
        "</label>"
        for i, (name, *_) in enumerate(variants)
    )
    pictures = "".join(f'<div class="axis{i}">{picture}</div>' for i, (*_, picture) in enumerate(variants))
    return f'<div class="card switch"><h3>{html.escape(variants[0][1])}</h3>{buttons}{pictures}</div>'
