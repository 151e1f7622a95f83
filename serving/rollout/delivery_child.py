"""One change of what is live, in a process of its own: what HTTP's admin calls start.

Because MLflow's import and trying out a bundle would hold up the requests of the replica that was
asked.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from driftline.platform.errors import DriftlineError
from driftline.platform.settings import parse_settings
from driftline.platform.workspace import Workspace
from driftline.serving.rollout.delivery import Delivery, live_facts


def carry_out(delivery: Delivery, action: str, arguments: Mapping[str, Any]) -> None:
    """One change, named as in ``POST /v1/admin/ACTION``."""
    match action:
        case "deploy" if arguments["role"] == "champion":
            delivery.deploy_champion(arguments["bundle"])
        case "deploy" if arguments["role"] == "canary":
            delivery.deploy_canary(arguments["bundle"], share=arguments["share"])
        case "deploy":
            delivery.deploy_shadow(arguments["bundle"])
        case "traffic" if arguments["stop"]:
            delivery.stop()
        case "traffic":
            delivery.set_share(arguments["share"])
        case "rollback":
            delivery.roll_back(arguments["to"])
        case _:
            raise ValueError(f"action must be deploy, traffic or rollback, got {action!r}")


def main() -> None:
    """Entry of ``python -m``; JSON on stdin, and on stdout."""
    os.nice(5)  # requests come first
    raw = json.load(sys.stdin)
    settings = parse_settings(raw["settings"], origin="of the server")
    delivery = Delivery(settings, by=raw["by"], via=raw["via"], change=raw["id"])
    answer: dict[str, Any]
    try:
        carry_out(delivery, raw["action"], raw["arguments"])
        answer = {"live": live_facts(Workspace.of(settings))}
    except DriftlineError as error:
        answer = {"error": {"type": type(error).__name__, "message": str(error)}}
    sys.stdout.write("\n" + json.dumps(answer))  # what libraries print comes before


if __name__ == "__main__":
    main()
