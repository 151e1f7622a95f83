"""From a finished bundle to a decision: judge it, register it, promote or refuse it."""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from driftline.features.log import ImpressionLog
from driftline.pipelines.gate_page import write_gate_page
from driftline.pipelines.judge import GateVerdict, judge
from driftline.pipelines.provenance import settings_hash
from driftline.pipelines.records import Kind, RefreshRecord, record_path, write_record
from driftline.pipelines.training_sets import known_frame
from driftline.platform.bundle import Bundle
from driftline.platform.errors import BundleError, DriftlineError, MissingArtefactError
from driftline.platform.registry import Registry, read_champion
from driftline.platform.sampling import part_mask, request_keys
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import read_traffic
from driftline.platform.windows import Window, format_time, parse_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Outcome = Literal["promoted", "canary", "refused"]

NUM_ADS_TIMED = 100
NEW_ITEM_HOURS = 24


@dataclass(frozen=True)
class Challenger:
    """A bundle that wants to go live, and what it cost."""

    bundle: Bundle
    num_rows: int
    seconds: float
    core_seconds: float


def champion_before(settings: DriftlineSettings, as_of: datetime, *, kind: Kind) -> Bundle | None:
    """The champion that a refresh at ``as_of`` starts from and is judged against.

    A refresh killed between its promotion and its record finds itself champion; then its parent is
    the one to start from, so that running it again gives the same bundle.

    Raises:
        DriftlineError: the champion already knows later data.
    """
    workspace = Workspace.of(settings)
    champion = Registry(settings, workspace).champion()
    if champion is None:
        return None
    bundle = Bundle.open(champion.path)
    known = parse_time(bundle.lineage["as_of"])
    if known > as_of and kind == "head":
        raise DriftlineError(
            f"the champion {bundle.fingerprint} knows the log up to {format_time(known)}, later "
            f"than {format_time(as_of)}; refresh at a later time, or roll back to an older bundle"
        )
    if known == as_of and bundle.lineage["kind"] == kind:
        parent = bundle.lineage["parent"]
        return None if parent is None else Bundle.open(workspace.bundles / parent)
    return bundle


def publish(
    settings: DriftlineSettings,
    challenger: Challenger,
    *,
    champion: Bundle | None,
    as_of: datetime,
    scratch: Path,
) -> RefreshRecord:
    """Judge, register, promote or refuse, write the gate's page and the record; clean up."""
    verdict = judge_bundle(settings, challenger.bundle, champion=champion, as_of=as_of)
    with FileLock(Workspace.of(settings).root / "publish.lock"):
        return _decide(
            settings, challenger, verdict, champion=champion, as_of=as_of, scratch=scratch
        )


def _decide(
    settings: DriftlineSettings,
    challenger: Challenger,
    verdict: GateVerdict,
    *,
    champion: Bundle | None,
    as_of: datetime,
    scratch: Path,
) -> RefreshRecord:
    workspace = Workspace.of(settings)
    bundle = challenger.bundle
    live_now = read_champion(workspace.bundles)
    expected = {bundle.fingerprint, champion.fingerprint if champion else None}
    if bundle.lineage["kind"] == "head" and live_now and live_now.fingerprint not in expected:
        raise DriftlineError(
            f"the champion became {live_now.fingerprint} while the head of "
            f"{champion.fingerprint if champion else 'none'} was refreshed, with other arms "
            "perhaps; run the head refresh again"
        )
    kind: Kind = bundle.lineage["kind"]
    registry = Registry(settings, workspace)
    version = registry.register(
        bundle.path,
        fingerprint=bundle.fingerprint,
        lineage=_tags(bundle.lineage) | {"core_seconds": f"{challenger.core_seconds:.1f}"},
        metrics={
            "seconds": challenger.seconds,
            "core_seconds": challenger.core_seconds,
            "num_rows": challenger.num_rows,
        }
        | {name: value for name, value in verdict.figures.items() if value is not None},
    )
    decision: Outcome = "promoted" if verdict.promote else "refused"
    reasons = verdict.reasons
    is_live = live_now is not None and live_now.fingerprint == bundle.fingerprint
    if verdict.promote and settings.gate.promote == "canary" and champion and not is_live:
        decision, said = _put_up(settings, version, bundle)
        reasons = (*reasons, said)
    if decision == "promoted":
        registry.promote(version, promoted_at=as_of, reasons=reasons)
    elif decision == "refused":
        registry.log_refusal(version, reasons=reasons, decided_at=as_of)
    page = record_path(workspace, kind, as_of).with_suffix(".html")
    write_gate_page(verdict, page, title=f"{kind} refresh {format_time(as_of)}")
    if not verdict.promote and champion is None:
        raise BundleError(
            f"the first bundle {bundle.fingerprint} was refused: {'; '.join(verdict.reasons)}; "
            f"see {page}; mend the cause and run it again"
        )
    live = champion if champion is not None and decision != "promoted" else bundle
    record = RefreshRecord(
        kind=kind,
        as_of=format_time(as_of),
        bundle=bundle.fingerprint,
        parent=champion.fingerprint if champion else None,
        decision=decision,
        settings=settings_hash(settings),
        reasons=reasons,
        num_rows=challenger.num_rows,
        seconds=round(challenger.seconds, 3),
        core_seconds=round(challenger.core_seconds, 3),
        auc_champion=verdict.figures.get("auc_champion"),
        auc_challenger=verdict.figures.get("auc_challenger"),
        champion=live.fingerprint,
    )
    write_record(workspace, record, as_of=as_of)
    shutil.rmtree(scratch, ignore_errors=True)
    logger.info(
        "%s refresh %s: %s, %d rows in %.1f s; %s",
        kind,
        record.as_of,
        record.decision,
        record.num_rows,
        record.seconds,
        "; ".join(record.reasons),
    )
    return record


def _put_up(settings: DriftlineSettings, version: int, bundle: Bundle) -> tuple[Outcome, str]:
    """Try a bundle that passed the gate as canary, unless another one is being judged.

    The one that is there stays: if each hour's bundle replaced it, none would ever be judged. But
    arms do not wait behind heads, because there is always another head.
    """
    from driftline.serving.rollout.delivery import Delivery  # the whole server: seconds to import

    traffic = read_traffic(Workspace.of(settings).bundles)
    there, share = traffic.canary, settings.serving.delivery.canary_share
    answers = f"it answers {share:.0%} of the request keys as canary"
    if there is not None and there.bundle.version == version:
        return "canary", answers  # put up by a refresh that was killed before its record
    by = f"{bundle.lineage['kind']} refresh"
    delivery = Delivery(settings, by=by, via="automatic")
    if there is not None:
        if (traffic.by, by) != ("head refresh", "arms refresh"):
            return "refused", (
                f"it passed, but canary version {there.bundle.version} is still being judged "
                "(`driftline traffic CONFIG --read-out`)"
            )
        delivery.stop(reasons=(f"an {by} takes its place",), shadows=False)
    delivery.deploy_canary(bundle.fingerprint, share=share)
    return "canary", answers


def judge_bundle(
    settings: DriftlineSettings, bundle: Bundle, *, champion: Bundle | None, as_of: datetime
) -> GateVerdict:
    """The gate's verdict on the newest matured slice, on requests nobody trained on."""
    window = gate_window(settings, as_of)
    frame = known_frame(settings, window, as_of=as_of)
    frame = frame.filter(part_mask(frame, "gate", split=settings.split))
    scorer = Scorer.of(bundle)
    return judge(
        frame["clicked"].to_numpy().astype(np.float64),
        champion=Scorer.of(champion).score(frame) if champion else None,
        challenger=scorer.score(frame),
        groups=request_keys(frame).to_numpy(),
        slices=_slices(frame),
        mechanical=_mechanical(bundle, scorer, frame),
        settings=settings.gate,
        seed=settings.seed,
        window=window,
    )


def judge_again(
    settings: DriftlineSettings, fingerprint: str | None, *, as_of: datetime
) -> GateVerdict:
    """The verdict on a published bundle beside the bundle it came from; changes nothing.

    Args:
        settings: Of the market.
        fingerprint: Which bundle; the newest version when not given.
        as_of: What is known.

    Raises:
        MissingArtefactError: nothing was published yet.
        BundleError: no such bundle.
    """
    workspace = Workspace.of(settings)
    versions = Registry(settings, workspace).versions()
    if not versions:
        raise MissingArtefactError("no bundle yet; run `driftline refresh arms CONFIG` first")
    chosen = fingerprint or versions[0].fingerprint
    bundle = Bundle.open(workspace.bundles / chosen)
    parent = bundle.lineage["parent"]
    champion = Bundle.open(workspace.bundles / str(parent)) if parent else None
    return judge_bundle(settings, bundle, champion=champion, as_of=as_of)


def gate_window(settings: DriftlineSettings, as_of: datetime) -> Window:
    """The newest hours whose labels are known."""
    span = ImpressionLog.open(Workspace.of(settings).clean, settings).span
    end = max(span.start, min(span.end, as_of - settings.labels.maturity))
    return Window(span.start, end).last(timedelta(hours=settings.gate.slice_hours))


def _slices(frame: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """New items and the tail; papers.md S0.37 asks for the tail."""
    age = frame["ad__hours_since_first"].fill_null(0.0).to_numpy()
    shown = [name for name in frame.column_names if name.startswith("ad__impressions_")]
    longest = max(shown, key=lambda name: int(name.removeprefix("ad__impressions_")[:-1]))
    impressions = frame[longest].fill_null(0.0).to_numpy()
    median = float(np.median(impressions)) if len(impressions) else 0.0
    return {"new items": age < NEW_ITEM_HOURS, "tail": impressions < median}


def _mechanical(bundle: Bundle, scorer: Scorer, frame: pa.Table) -> Mapping[str, bool | float]:
    """Does it load whole, answer, in finite numbers, fast?"""
    Bundle.open(bundle.path)
    if frame.num_rows == 0:
        return {"loads": True}
    ads = frame.take(pa.array(np.resize(np.arange(frame.num_rows), NUM_ADS_TIMED)))
    scores = scorer.score(ads)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        scorer.score(ads)
        seconds.append(time.perf_counter() - started)
    return {
        "loads": True,
        "answers": len(scores) == NUM_ADS_TIMED,
        "finite": bool(np.isfinite(scores).all()),
        "fast": 1000 * min(seconds),  # of the code, not of what else the machine does
    }


def _tags(lineage: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in lineage.items()}
