"""The commands ``driftline deploy``, ``traffic`` and ``rollback``."""

import getpass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from driftline.pipelines.console import Output
from driftline.pipelines.options import Config, Json, Set, market_settings
from driftline.platform.errors import SettingsError

if TYPE_CHECKING:
    from driftline.platform.settings import DriftlineSettings
    from driftline.serving.rollout.delivery import Delivery


def deploy(
    config: Config,
    bundle: Annotated[str, typer.Option(help="Version, fingerprint or its beginning.")],
    champion: Annotated[bool, typer.Option("--champion", help="Answer all requests.")] = False,
    canary: Annotated[
        float | None, typer.Option(help="Answer this share of the requests, e.g. 0.1.")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Score along without answering.")
    ] = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Bring a bundle live, after checking that it loads and answers."""
    if champion + shadow + (canary is not None) != 1:
        raise SettingsError("deploy needs one of --champion, --canary SHARE and --shadow")
    settings, delivery = _delivery(config, set_)
    if champion:
        delivery.deploy_champion(bundle)
    elif canary is not None:
        delivery.deploy_canary(bundle, share=canary)
    else:
        delivery.deploy_shadow(bundle)
    _show_live(settings, as_json=json_)


def traffic(
    config: Config,
    canary: Annotated[float | None, typer.Option(help="Give the canary another share.")] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="Withdraw canary and shadows; the champion stays.")
    ] = False,
    read_out: Annotated[
        bool, typer.Option("--read-out", help="How the canary does beside the champion.")
    ] = False,
    decide: Annotated[
        bool, typer.Option("--decide", help="Promote or withdraw the canary by the rules.")
    ] = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Show or change what is live; read out a canary and act on it."""
    if stop + read_out + decide + (canary is not None) > 1:
        raise SettingsError("traffic takes one of --canary SHARE, --stop, --read-out, --decide")
    settings, delivery = _delivery(config, set_)
    if read_out or decide:
        _judge(settings, delivery if decide else None, as_json=json_)
        return
    if canary is not None:
        delivery.set_share(canary)
    elif stop:
        delivery.stop()
    _show_live(settings, as_json=json_)


def rollback(
    config: Config,
    to: Annotated[
        str | None, typer.Option(help="Version or fingerprint; the champion before if absent.")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Make the earlier champion answer again, after checking that it does; withdraw the canary."""
    settings, delivery = _delivery(config, set_)
    delivery.roll_back(to)
    _show_live(settings, as_json=json_)


def _judge(settings: "DriftlineSettings", delivery: "Delivery | None", *, as_json: bool) -> None:
    from driftline.pipelines.read_out import read_out, read_out_text
    from driftline.pipelines.traffic import act_on_canary

    if delivery is None:
        found = read_out(settings)
        Output(as_json).show(read_out_text(found), found.to_json())
        return
    verdict = act_on_canary(settings, delivery=delivery, now=datetime.now(UTC))
    decision = verdict.decision
    text = "\n".join([read_out_text(verdict.found), decision.action, *decision.reasons])
    Output(as_json).show(text, verdict.to_json())


def _show_live(settings: "DriftlineSettings", *, as_json: bool) -> None:
    from driftline.pipelines.traffic import traffic_facts, traffic_text

    facts = traffic_facts(settings)
    Output(as_json).show(traffic_text(facts), facts)


def _delivery(config: Path, overrides: list[str] | None) -> "tuple[DriftlineSettings, Delivery]":
    from driftline.serving.rollout.delivery import Delivery

    settings = market_settings(config, overrides)
    return settings, Delivery(settings, by=getpass.getuser(), via="command")
