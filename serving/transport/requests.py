"""A scoring request: parsed and checked once, by a pydantic model made from the contract.

Every refusal says which field it is about, what came, and what is allowed. Unknown keys are refused
everywhere, so that a misspelt feature cannot pass for a missing one. A plain good request is known
as such in half the time (``plain_requests.py``); all others go through the model.
"""

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from reprlib import Repr
from typing import Annotated, Any, Final, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
)

from driftline.platform.errors import RequestError
from driftline.serving.transport.plain_requests import PlainRequests

Key = int | str
KeyType = Literal["int64", "string"]
MAX_KEY_LENGTH: Final = 256
MAX_SHOWN: Final = 60
NAME: Final = Annotated[StrictStr, Field(min_length=1, max_length=MAX_KEY_LENGTH)]

EXAMPLE: Final = '{"page_product_id": ..., "ad_product_ids": [...], "context": {...}}'


class RefusedRequestError(RequestError):
    """A request that is answered with an HTTP error; made by :func:`refuse`."""

    status: int = 400
    code: str = "bad_request"
    field: str | None = None
    allowed: Any = None
    hint: str | None = None
    told: bool = False
    """Whether the observers know of it."""

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        error: dict[str, Any] = {"code": self.code, "message": str(self)}
        for name in ("field", "allowed", "hint"):
            if (value := getattr(self, name)) is not None:
                error[name] = value
        return {"error": error}


def refuse(
    message: str,
    *,
    status: int,
    code: str,
    field: str | None = None,
    allowed: Any = None,
    hint: str | None = None,
) -> RefusedRequestError:
    """The error to raise; a function, because an error class takes only its message."""
    error = RefusedRequestError(message)
    error.status, error.code = status, code
    error.field, error.allowed, error.hint = field, allowed, hint
    return error


@dataclass(frozen=True)
class ContextFeature:
    """A column of the impression that the request brings along."""

    name: str
    kind: Literal["categorical", "numeric"]


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """One page and the ads that compete for it."""

    page: Key
    ads: tuple[Key, ...] | NDArray[np.int64]
    """In the order of the request, duplicates kept. Out of the parser, integers are an array."""
    context: Mapping[str, str | float | None]
    """Every context feature of the contract; ``None`` for what the request left out."""
    time: datetime | None = None
    """Moment to score at, when the request brings its own."""
    request_id: str | None = None
    """Names the page view in the answer and in the decision log; see :func:`made_up_ids`."""
    request_key: str | None = None
    """Who asks, e.g. a session: the same key is always answered by the same bundle of an A/B
    test. The request's own ``request_id`` stands in when not given."""

    @property
    def ads_array(self) -> NDArray[np.int64] | None:
        """The ads as an array ``[B]``; ``None`` where products are strings."""
        if isinstance(self.ads, np.ndarray):
            return self.ads
        return np.array(self.ads, np.int64) if isinstance(self.ads[0], int) else None


def made_up_ids() -> Iterator[str]:
    """Ids for requests that come without one, in 0.2 us each; threads may share the iterator.

    Each iterator begins with 64 random bits and counts on, so no other replica, before or after a
    restart, makes the same.
    """
    return map(f"{secrets.token_hex(8)}-{{}}".format, itertools.count(1))


class RequestParser:
    """Reads the body of ``POST /v1/score`` for one contract.

    Args:
        key_type: Type of product ids in the log the model was trained on.
        context: Columns of the impression.
        max_ads: Largest number of ads in one request.
        accept_time: Whether a request may say at which moment it wants to be scored.
    """

    def __init__(
        self,
        key_type: KeyType,
        context: Sequence[ContextFeature],
        *,
        max_ads: int,
        accept_time: bool,
    ) -> None:
        self._names = tuple(feature.name for feature in context)
        self._max_ads = max_ads
        self._key_words = "an integer" if key_type == "int64" else "a string"
        key = _key_annotation(key_type)
        closed = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
        # Numbered attributes with the feature's name as alias: a feature may be called "copy".
        values: dict[str, Any] = {
            f"c{index}": (_context_annotation(feature), Field(None, alias=feature.name))
            for index, feature in enumerate(context)
        }
        fields: dict[str, Any] = {
            "page_product_id": (key, ...),
            "ad_product_ids": (
                Annotated[list[key], Field(min_length=1, max_length=max_ads)],  # type: ignore[valid-type]
                ...,
            ),
            "context": (create_model("Context", __config__=closed, **values) | None, None),
            "request_id": (NAME | None, None),
            "request_key": (NAME | None, None),
        }
        if accept_time:
            fields["time"] = (Annotated[AwareDatetime, Strict()] | None, None)
        self._model: type[BaseModel] = create_model("ScoreBody", __config__=closed, **fields)
        self._fields = tuple(fields)
        self._plain = PlainRequests(
            integers=key_type == "int64",
            context={feature.name: feature.kind == "numeric" for feature in context},
            max_ads=max_ads,
            max_length=MAX_KEY_LENGTH,
        )

    def parse(self, body: bytes) -> ScoreRequest:
        """Read a JSON body.

        Raises:
            RefusedRequestError: not JSON (400), or JSON that breaks the contract (422).
        """
        try:
            raw = orjson.loads(body)
        except orjson.JSONDecodeError:
            raw = None
        plain = self._plain.read(raw)
        if plain is not None:
            return ScoreRequest(*plain)
        self._refuse_masses(raw)
        try:
            return self._request(self._model.model_validate_json(body))
        except ValidationError as error:
            raise self._explain(error) from None

    def check(self, values: Mapping[str, Any]) -> ScoreRequest:
        """The request in values that were read from another form.

        Args:
            values: As in JSON, but integer ads may be an array and the time a ``datetime``.

        Raises:
            RefusedRequestError: they break the contract (422).
        """
        plain = self._plain.read(values)
        if plain is not None:
            return ScoreRequest(*plain)
        ads = values.get("ad_product_ids")
        if isinstance(ads, np.ndarray):
            values = {**values, "ad_product_ids": ads.tolist()}
        try:
            return self._request(self._model.model_validate(values))
        except ValidationError as error:
            raise self._explain(error) from None

    def json_schema(self) -> dict[str, Any]:
        """What a request may look like, as JSON Schema 2020-12 for OpenAPI."""
        schema = self._model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["title"] = "ScoreRequest"
        return schema

    def _refuse_masses(self, raw: Any) -> None:
        """Refuse at a glance what the model would take a second to complain about, item by item."""
        if not isinstance(raw, dict):
            return
        context, ads = raw.get("context"), raw.get("ad_product_ids")
        unknown: list[tuple[str, ...]] = [(name,) for name in raw if name not in self._fields]
        if isinstance(context, dict):
            unknown += [("context", name) for name in context if name not in self._names]
        if unknown:
            raise self._refusal("extra_forbidden", unknown[0], None, more=len(unknown) - 1)
        if isinstance(ads, list) and len(ads) > self._max_ads:
            raise self._refusal("too_long", ("ad_product_ids",), {"input": ads}, more=0)

    def _request(self, raw: Any) -> ScoreRequest:
        values = raw.context.__dict__.values() if raw.context else (None,) * len(self._names)
        time = getattr(raw, "time", None)
        ads = raw.ad_product_ids
        return ScoreRequest(
            page=raw.page_product_id,
            ads=np.array(ads, np.int64) if isinstance(ads[0], int) else tuple(ads),
            context=dict(zip(self._names, values, strict=True)),
            time=None if time is None else _in_utc(time),
            request_id=raw.request_id,
            request_key=raw.request_key,
        )

    def _explain(self, error: ValidationError) -> RefusedRequestError:
        detail = error.errors(include_url=False)[0]
        kind, location = detail["type"], detail["loc"]
        if kind == "json_invalid":
            reason = detail["msg"].removeprefix("Invalid JSON: ")
            return refuse(
                f"the body is not JSON: {reason}" if detail["input"] else "the body is empty",
                status=400,
                code="invalid_json",
                hint=f"send {EXAMPLE}",
            )
        return self._refusal(kind, location, detail, more=error.error_count() - 1)

    def _refusal(
        self, kind: str, location: tuple[int | str, ...], detail: Any, *, more: int
    ) -> RefusedRequestError:
        field = ".".join(str(part)[:MAX_SHOWN] for part in location)
        message = f"{field or 'the body'}: {self._say(kind, location, detail)}"
        return refuse(
            message + (f" (and {more} more)" if more else ""),
            status=422,
            code=CODES.get(kind, "wrong_value"),
            field=field or None,
            allowed=self._allowed(kind, location),
            hint=None if location else f"send {EXAMPLE}",
        )

    def _say(self, kind: str, location: tuple[int | str, ...], detail: Any) -> str:
        if kind == "missing":
            return "is required"
        if kind == "extra_forbidden":
            if location == ("time",):
                return "is refused while serving.clock is 'wall'; the server takes its own time"
            return "is not known"
        if kind == "too_short":
            return "must hold at least one ad, got none"
        if kind == "too_long":
            return f"must hold at most {self._max_ads} ads, got {len(detail['input'])}"
        got = show(detail["input"])
        if location and location[0] in ("request_id", "request_key"):
            return f"must be a string of 1 to {MAX_KEY_LENGTH} characters or null, got {got}"
        if location and location[0] in ("page_product_id", "ad_product_ids"):
            whole = location == ("ad_product_ids",)
            wanted = f"a list, each {self._key_words}" if whole else self._key_words
            return f"must be {wanted}, as in the log{LIMITS.get(kind, '')}, got {got}"
        if location == ("context",):
            return f"must be an object of features, got {got}"
        return f"{EXPECTED.get(kind, detail['msg'])}, got {got}"

    def _allowed(self, kind: str, location: tuple[int | str, ...]) -> Any:
        if kind == "extra_forbidden":
            return list(self._names if location[0] == "context" else self._fields)
        if location == ("context",):
            return list(self._names)
        if kind == "too_long":
            return {"max_ads": self._max_ads}
        return None


CODES: Final = {
    "missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "too_short": "no_ads",
    "too_long": "too_many_ads",
}
LIMITS: Final = {
    "greater_than_equal": " (64 bits)",
    "less_than": " (64 bits)",
    "string_too_long": f" (at most {MAX_KEY_LENGTH} characters)",
}
EXPECTED: Final = {
    "model_type": f"must be an object such as {EXAMPLE}",
    "string_type": "must be a string or null",
    "float_type": "must be a number or null",
    "finite_number": "must be a finite number or null",
    "timezone_aware": "must have a time zone, e.g. 2026-01-05T12:00:00Z",
    "datetime_parsing": "must be ISO 8601 with a time zone, e.g. 2026-01-05T12:00:00Z",
    "datetime_from_date_parsing": "must be ISO 8601 with a time zone, e.g. 2026-01-05T12:00:00Z",
    "datetime_type": "must be ISO 8601 with a time zone, e.g. 2026-01-05T12:00:00Z",
}


def show(value: object) -> str:
    """A value from outside, shortened for a message."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


_SHORT: Final = Repr()
"""Looks at the first few items only: what came may hold half a million."""
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MAX_SHOWN


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise refuse(
            f"time: must lie in the years 1 to 9999 of UTC, got {show(time.isoformat())}",
            status=422,
            code="wrong_value",
            field="time",
        ) from None


def _key_annotation(key_type: KeyType) -> Any:
    if key_type == "int64":
        return Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
    return Annotated[StrictStr, Field(min_length=1, max_length=MAX_KEY_LENGTH)]


def _context_annotation(feature: ContextFeature) -> Any:
    return StrictStr | None if feature.kind == "categorical" else StrictFloat | None
