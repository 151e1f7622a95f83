"""A made-up replay whose truth is known: models that age lose a known amount of signal."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.platform.metrics import sigmoid

START = datetime(2026, 1, 5, tzinfo=UTC)
STALE = (1, 3, 6, 12, 24, 48)


def scores_table(
    *, num_hours: int = 96, requests_per_hour: int = 100, ads: int = 10, seed: int = 0
) -> pa.Table:
    """Scores of every policy; a model that is k hours old sees the drifting part k hours late."""
    rng = np.random.default_rng(seed)
    daily = 1 + 0.5 * np.sin(2 * np.pi * (np.arange(num_hours) - 9) / 24)
    hour_of_request = np.repeat(np.arange(num_hours), (requests_per_hour * daily).astype(int))
    request = np.repeat(np.arange(len(hour_of_request)), ads)
    hour = hour_of_request[request]
    product = rng.integers(400, size=len(request))
    steady = rng.normal(0, 0.8, 400)
    shocks = rng.normal(0, 1, (num_hours + 60, 400))
    decay, drift = 0.97, [rng.normal(0, 1, 400)]
    for shock in shocks:
        drift.append(decay * drift[-1] + np.sqrt(1 - decay**2) * shock)
    drifting = np.array(drift[60:])
    truth = -3.2 + steady[product] + 0.8 * drifting[hour, product]
    clicked = rng.random(len(truth)) < sigmoid(truth)
    noise = 0.35 * rng.normal(0, 1, len(truth))

    def model(
        age: int | NDArray[np.int_], *, extra: float = 0.0, sees: float = 1.0
    ) -> NDArray[np.float64]:
        seen = drifting[np.maximum(hour - 1 - age, 0), product]
        own = extra * rng.normal(0, 1, len(truth))
        shift = 0.002 * np.minimum(age, 96)
        return sigmoid(-3.15 + steady[product] + sees * 0.72 * seen + noise + own + shift)

    minutes = rng.uniform(0, 60, len(hour_of_request))[request]
    times = [
        START + timedelta(hours=int(h), minutes=float(m))
        for h, m in zip(hour, minutes, strict=True)
    ]
    columns: dict[str, Any] = {
        "impression_id": [f"i{number}" for number in range(len(truth))],
        "request_id": [f"r{number}" for number in request],
        "event_time": pa.array(times, pa.timestamp("us", tz="UTC")),
        "clicked": clicked,
        "new_item": product >= 360,
        "refreshed": model(0),
        "never": model(hour),
        "arms_only": model(hour % 48 + 6),
        "mlp_never": model(hour, extra=0.5),
        "mlp_hourly": model(0, extra=0.5),
        "lightgbm_hourly": model(0, extra=0.35, sees=0.9),
        "oracle": sigmoid(truth),
    }
    for age in STALE:
        columns[f"stale_{age}h"] = np.where(hour >= age, model(age), np.nan)
    return pa.table(columns).sort_by("event_time")


def summary(*, num_hours: int = 96, seed: int = 0) -> dict[str, Any]:
    """What the replay says beside the scores."""
    rng = np.random.default_rng(seed)
    refreshes = []
    for hour in range(num_hours):
        kind = "arms" if hour % 48 == 0 else "head"
        refused = hour in (17, 58)
        change = -0.03 if refused else float(rng.normal(0.004, 0.006))
        seconds = float(rng.normal(6, 0.4) if kind == "head" else rng.normal(410, 12))
        reason = (
            "AUC fell by 0.0312 [0.0121, 0.0500], more than the 0.0100 allowed; slice "
            "2026-01-05T11:00Z..17:00Z, 5,812 rows, 291 clicks"
            if refused
            else "AUC rose by 0.0041 [-0.0020, 0.0100], a fall of 0.0100 is allowed"
        )
        refreshes.append(
            {
                "kind": kind,
                "as_of": (START + timedelta(hours=hour)).isoformat(),
                "seconds": seconds,
                "core_seconds": seconds * 1.6,
                "num_rows": 24_000,
                "decision": "refused" if refused else "promoted",
                "reasons": [reason, "all mechanical checks held"][: 1 if refused else 2],
                "bundle": f"{hour:016x}",
                "auc_champion": 0.74 if hour else None,
                "auc_challenger": 0.74 + change,
            }
        )
    return {
        "name": "demo",
        "span": ["2026-01-01T00:00:00Z", "2026-01-09T00:00:00Z"],
        "id_window": ["2026-01-05T00:00:00Z", "2026-01-09T00:00:00Z"],
        "last_hours": 72,
        "seed": 7,
        "num_bootstrap": 500,
        "machine": {"cores": 2, "model": "Example CPU", "memory_gib": 24.0, "load": 0.4},
        "commit": "0123456789ab",
        "settings_hash": "ba9876543210",
        "refreshes": refreshes,
        "peers": [
            {"policy": policy, "as_of": refresh["as_of"], "seconds": seconds}
            for policy, seconds in (("mlp_hourly", 0.6), ("lightgbm_hourly", 4.8))
            for refresh in refreshes
        ],
    }
