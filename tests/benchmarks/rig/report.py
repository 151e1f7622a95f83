"""What every benchmark prints: a table for people, and one JSON line at the end."""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from driftline.pipelines.provenance import code_version, machine


def about() -> dict[str, Any]:
    """Which code runs, and on what; asked before the measuring, as it tells the machine's load."""
    return {"commit": code_version(), "machine": machine()}


def print_figures(
    benchmark: str, figures: Mapping[str, float], *, origin: Mapping[str, Any], **more: Any
) -> None:
    """The last line; ``origin`` is of ``about()``. Figures that are no numbers are left out."""
    rounded = {
        name: float(f"{value:.4g}")
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    }
    print(json.dumps({"benchmark": benchmark, **origin, **more, "figures": rounded}))


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> str:
    """Median, and the least and the largest value."""
    if not values:
        return "-"
    middle = statistics.median(values)
    return f"{middle:.4g} ({min(values):.4g} .. {max(values):.4g})"


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows that share their keys, the keys as headings."""
    print(f"\n{title}")
    if not rows:
        print("  nothing was measured")
        return
    names = list(rows[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    print("  " + "  ".join(n.ljust(w) for n, w in zip(names, widths, strict=True)).rstrip())
    for row in cells:
        print("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {part}" for name, part in value.items()) or "-"
    return "-" if value is None else str(value)
