"""How every picture looks, and a picture as part of a page."""

import base64
import io
import re
import warnings
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

_KOREAN_FONTS = {"Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo"}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", *sorted(_KOREAN_FONTS & {font.name for font in fontManager.ttflist})],
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def png(figure: Figure) -> bytes:
    """Return the picture as a PNG file. Without a Korean font, boxes stand for Korean letters."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def svg(figure: Figure) -> str:
    """Return the picture as SVG for a page: as wide as its place, its text in the page's fonts."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    start = out.getvalue().index("<svg")
    return re.sub(r' (width|height)="[\d.]+pt"', "", out.getvalue()[start:], count=2)


def embedded(image: bytes) -> str:
    """Return a PNG file as an address that a page can hold."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
