"""Score one request in this process, without a server: ``driftline score``."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson

from driftline.platform.errors import MissingArtefactError, RequestError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import format_time
from driftline.serving.service import BundleService
from driftline.serving.transport.requests import Key


def score_once(
    settings: DriftlineSettings,
    *,
    page: Key,
    ads: Sequence[Key],
    context: Mapping[str, Any] | None = None,
    as_of: datetime | None = None,
) -> dict[str, Any]:
    """The answer that the server would give.

    Args:
        settings: ``serving.clock`` says when, unless ``as_of`` does.
        page: Page product; text is read as an integer where the log's keys are integers.
        ads: Ad products, in order.
        context: Features of the impression; numbers may be given as text.
        as_of: Moment to score at; allowed with every clock, because no server is concerned.

    Raises:
        MissingArtefactError: no champion yet.
        RequestError: the request breaks the contract.
    """
    if as_of is not None:
        serving = settings.serving.model_copy(update={"clock": as_of})
        settings = settings.model_copy(update={"serving": serving})
    service = BundleService(settings)
    service.look()
    contract = service.contract
    if contract is None:
        problem = service.status()["last_refusal"]
        raise MissingArtefactError(
            f"{settings.name} has no champion to score with"
            + (f" ({problem['message']})" if problem else "")
            + "; run `driftline refresh arms CONFIG` first"
        )
    body: dict[str, Any] = {
        "page_product_id": _key(page, contract, name="page"),
        "ad_product_ids": [_key(ad, contract, name="ad") for ad in ads],
        "context": {
            name: _value(value, contract["context"].get(name), name=name)
            for name, value in (context or {}).items()
        },
    }
    if as_of is not None:
        body["time"] = format_time(as_of)
    answer = orjson.loads(service.score(orjson.dumps(body)))
    assert isinstance(answer, dict)
    return answer


def parse_context(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``name=value`` pairs from the command line.

    Raises:
        RequestError: a pair without an equals sign.
    """
    context = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise RequestError(f"--context needs the form name=value, got {pair!r}")
        context[name] = value
    return context


def _key(key: Key, contract: Mapping[str, Any], *, name: str) -> Key:
    if contract["key_type"] != "int64" or isinstance(key, int):
        return key
    try:
        return int(key)
    except ValueError as error:
        raise RequestError(f"{name}: products of this log are integers, got {key!r}") from error


def _value(value: Any, kind: str | None, *, name: str) -> Any:
    if kind != "numeric" or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError as error:
        raise RequestError(f"context.{name}: must be a number, got {value!r}") from error
