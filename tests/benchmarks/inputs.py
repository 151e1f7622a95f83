"""How fast does a log come in? Simulate a market, check it, and measure its drift scales.

    python tests/benchmarks/inputs.py [--quick] [--mind DIR]

The bar is 200,000 simulated impressions a second, at the demo's size and on large days. Figures are
medians of three runs; rows are impressions.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))  # the script's own folder is there already

from tests.benchmarks.rig.report import about, print_figures

from driftline.features.log import ImpressionLog
from driftline.features.mind import ingest_mind
from driftline.features.quality import check_log
from driftline.features.scales import estimate_scales
from driftline.features.simulate import simulate
from driftline.platform.settings import DriftlineSettings, load_settings

CONFIGS = Path(__file__).parents[2] / "configs"
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def seconds(run: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    print(f"    {statistics.median(taken):8.2f} s  ({min(taken):.2f} .. {max(taken):.2f})")
    return statistics.median(taken)


def measure_market(
    name: str, settings: DriftlineSettings, root: Path, *, repeats: int
) -> dict[str, float]:
    raw, clean = root / f"{name}-raw", root / f"{name}-clean"
    print(f"{name}: simulate, check, scales")
    made = seconds(lambda: simulate(settings, raw), repeats)
    num_rows = ImpressionLog.open(raw, settings).num_rows
    checked = seconds(lambda: check_log(raw, clean, settings=settings, now=NOW), repeats)
    log = ImpressionLog.open(clean, settings)
    scaled = seconds(lambda: estimate_scales(log, settings), repeats)
    print(f"    {num_rows:,} rows: {num_rows / made:,.0f} simulated/s")
    return {
        f"simulate_rows_per_s_{name}": num_rows / made,
        f"check_rows_per_s_{name}": num_rows / checked,
        f"scales_seconds_{name}": scaled,
    }


def measure_mind(source: Path, root: Path, *, repeats: int) -> dict[str, float]:
    settings = load_settings(CONFIGS / "mind.yaml")
    print("mind: ingest")
    taken = seconds(lambda: ingest_mind(source, root / "mind", settings=settings), repeats)
    num_rows = ImpressionLog.open(root / "mind", settings).num_rows
    return {"ingest_mind_rows_per_s": num_rows / taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--mind", type=Path, help="folder with behaviors.tsv and news.tsv")
    options = parser.parse_args()
    repeats = 1 if options.quick else 3
    demo = load_settings(CONFIGS / "demo.yaml")
    large = load_settings(
        CONFIGS / "demo.yaml",
        overrides=["source.num_days=4", "source.impressions_per_day=500000"],
    )
    origin, figures = about(), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        figures |= measure_market("demo", demo, root, repeats=repeats)
        figures |= measure_market("large", large, root, repeats=repeats)
        if options.mind is not None:
            figures |= measure_mind(options.mind, root, repeats=repeats)
    print_figures("inputs", figures, origin=origin)


if __name__ == "__main__":
    main()
