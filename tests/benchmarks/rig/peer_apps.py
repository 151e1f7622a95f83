"""What others build: the same bundle behind other servers, each in a process of its own.

    python -m tests.benchmarks.rig.peer_apps uvicorn SETTINGS.json --port 9000

- ``uvicorn``: raw ASGI on uvicorn (uvloop, httptools) around our own service, with no routes, no
  limits and nobody who watches: what a server for this bundle cannot be quicker than.
- ``fastapi``: FastAPI, features by Feast's ``get_online_features``, the head in torch.
- ``bert``: raw ASGI on uvicorn, our features, and the arms in the request's path: one page and all
  ads are encoded each time. Their tokens are made beforehand.
"""

import argparse
import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import torch
import uvicorn
from numpy.typing import NDArray

from driftline.features.definitions import (
    ENTITY_KEYS,
    HEAD_CATEGORIES,
    HEAD_PRODUCTS,
    feast_column,
    frame_sources,
)
from driftline.features.online import OnlineFeatures
from driftline.features.store import open_store
from driftline.features.texts import read_texts
from driftline.features.views import NO_TEXT
from driftline.platform.bundle import ARMS, TOKENIZER, Bundle
from driftline.platform.columns import TEXT_ID_COLUMNS
from driftline.platform.examples import Ragged
from driftline.platform.inputs import frame_texts
from driftline.platform.models.build import build_model
from driftline.platform.models.student import AD, PAGE, TwinStudent
from driftline.platform.registry import read_champion
from driftline.platform.scorer import Scorer, twin_spec
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.text import Tokenizer, serialise_row
from driftline.platform.workspace import Workspace
from driftline.serving.service import BundleService
from driftline.serving.transport.wire import JsonForm

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Columns = dict[str, NDArray[Any]]


class RawAsgi:
    """Bodies in, bodies out; whatever the path."""

    def __init__(self, score: Callable[[bytes], bytes]) -> None:
        self._score = score

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        content = self._score(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def uvicorn_app(settings: DriftlineSettings) -> Any:
    """Our service without Ray Serve and HAProxy."""
    service = BundleService(settings, replica="uvicorn")
    service.start()
    form = JsonForm()

    def score(body: bytes) -> bytes:
        answer = service.answer(body, form)
        content = form.write(answer)
        service.sent(answer)
        return content

    return RawAsgi(score)


def fastapi_app(settings: DriftlineSettings) -> Any:
    """The stack that tutorials build."""
    from fastapi import FastAPI
    from pydantic import BaseModel

    class ScoreBody(BaseModel):
        page_product_id: int
        ad_product_ids: list[int]
        context: dict[str, str | float | None] = {}

    bundle = champion(settings)
    scorer = Scorer.of(bundle)
    features = FeastFeatures(settings)
    vectors = {alias: torch.from_numpy(np.array(getattr(bundle.vectors, alias))) for alias in
               ("page", "ad")}  # fmt: skip
    app = FastAPI()

    def score(body: ScoreBody) -> dict[str, Any]:
        columns = features.read(body.page_product_id, body.ad_product_ids, body.context)
        probabilities = torch_scores(scorer, columns, vectors=vectors)
        return {"bundle": bundle.fingerprint, "probabilities": probabilities.tolist()}

    score.__annotations__["body"] = ScoreBody
    app.post("/v1/score")(score)
    return app


class FeastFeatures:
    """Columns of a request by ``get_online_features``, in two calls: categories come second."""

    def __init__(self, settings: DriftlineSettings) -> None:
        self._store = open_store(settings)
        self._products = self._store.get_feature_service(HEAD_PRODUCTS)
        self._categories = self._store.get_feature_service(HEAD_CATEGORIES)
        self._sources = {
            column: (alias, feast_column(column, alias, view))
            for column, alias, view in frame_sources(settings)
        }
        self._category = settings.counters.category
        self._context = [feature.name for feature in settings.select(entity="impression")]

    def read(self, page: int, ads: list[int], context: dict[str, Any]) -> Columns:
        rows: list[dict[str, Any]] = [
            {ENTITY_KEYS["page"]: page, ENTITY_KEYS["ad"]: ad} for ad in ads
        ]
        found = self._ask(self._products, rows)
        columns = self._columns(found, ("page", "ad"))
        of_page, of_ad = (columns[f"{alias}__{self._category}"] for alias in ("page", "ad"))
        rows = [
            {ENTITY_KEYS["ad_category"]: ad, ENTITY_KEYS["category_pair"]: f"{page}|{ad}"}
            for page, ad in zip(of_page, of_ad, strict=True)
        ]
        found = self._ask(self._categories, rows)
        columns |= self._columns(found, ("ad_category", "category_pair"))
        for name in self._context:
            columns[name] = np.full(len(ads), context.get(name), np.object_)
        return columns

    def _ask(self, service: Any, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        response = self._store.get_online_features(
            features=service, entity_rows=rows, full_feature_names=True
        )
        values: dict[str, list[Any]] = response.to_dict()
        return values

    def _columns(self, found: dict[str, list[Any]], aliases: tuple[str, ...]) -> Columns:
        columns: Columns = {}
        for column, (alias, name) in self._sources.items():
            if alias not in aliases:
                continue
            values = found[name]
            if column in TEXT_ID_COLUMNS:
                ids = [NO_TEXT if value is None else value for value in values]
                columns[column] = np.array(ids, np.int64)
            elif any(isinstance(value, str) for value in values):
                columns[column] = np.array(values, np.object_)
            else:
                numbers = [np.nan if value is None else value for value in values]
                columns[column] = np.array(numbers, np.float32)
        return columns


def bert_app(settings: DriftlineSettings) -> Any:
    """The arms where their vectors are usually looked up."""
    bundle = champion(settings)
    scorer, arms = Scorer.of(bundle), ArmsInPath(settings, bundle)
    features = OnlineFeatures.open(settings)
    now = features.as_of
    assert now is not None

    def score(body: bytes) -> bytes:
        asked = orjson.loads(body)
        page, ads = asked["page_product_id"], asked["ad_product_ids"]
        read = features.read(page, ads, context=asked["context"], now=now)
        columns = read.columns
        page_H, ad_BH = arms.encode(*(columns[name] for name in TEXT_ID_COLUMNS))
        categories, numbers = scorer.tabular.encode(columns)
        with torch.inference_mode():
            logits_B2 = scorer.head.head(
                page_H.expand(len(ads), -1),
                ad_BH,
                torch.from_numpy(categories).long(),
                torch.from_numpy(numbers),
            ).numpy()
        probabilities = scorer.calibration.probabilities(logits_B2[:, 1] - logits_B2[:, 0])
        answer = {"bundle": bundle.fingerprint, "probabilities": probabilities}
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    return RawAsgi(score)


class ArmsInPath:
    """Encodes the page and the ads of each request."""

    def __init__(self, settings: DriftlineSettings, bundle: Bundle) -> None:
        from safetensors.torch import load_file

        spec = twin_spec(bundle.student)
        assert spec is not None
        student = build_model(spec, pretrained=False)
        assert isinstance(student, TwinStudent)
        student.load_state_dict(load_file(bundle.path / ARMS), strict=False)
        self._arms, self._spec = student.arms.eval(), spec.encoder
        texts = read_texts(settings).sort_by("text_id")
        self._text_id = texts["text_id"].to_numpy()
        strings = [serialise_row(row) for row in texts.drop_columns(["text_id"]).to_pylist()]
        tokenizer = Tokenizer(bundle.path / TOKENIZER)
        self._tokens = Ragged.of(tokenizer.encode(strings, max_tokens=spec.encoder.max_tokens))

    def encode(
        self, page_B: NDArray[np.int64], ad_B: NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of the page ``[H]`` and of the ads ``[B, H]``."""
        page = self._encode(page_B[:1], PAGE)
        return page[0], self._encode(ad_B, AD)

    def _encode(self, text_ids: NDArray[np.int64], role: int) -> torch.Tensor:
        rows = np.searchsorted(self._text_id, text_ids)
        ids, mask = frame_texts(self._spec, self._tokens, rows, role=role)
        with torch.inference_mode():
            return self._arms.encode(ids, mask, role)


def torch_scores(
    scorer: Scorer, columns: Columns, *, vectors: dict[str, torch.Tensor]
) -> NDArray[np.float64]:
    """Probabilities by the head as it was trained: nothing folded."""
    categories, numbers = scorer.tabular.encode(columns)
    rows_B2 = torch.from_numpy(scorer.text_rows(columns)).long()
    with torch.inference_mode():
        logits_B2 = scorer.head(
            vectors["page"][rows_B2[:, 0]],
            vectors["ad"][rows_B2[:, 1]],
            rows_B2 < 0,
            torch.from_numpy(categories).long(),
            torch.from_numpy(numbers),
        ).numpy()
    return scorer.calibration.probabilities(logits_B2[:, 1] - logits_B2[:, 0])


def champion(settings: DriftlineSettings) -> Bundle:
    """The bundle that all of them serve."""
    pointer = read_champion(Workspace.of(settings).bundles)
    assert pointer is not None
    return Bundle.open(pointer.path)


APPS: Final[dict[str, Callable[[DriftlineSettings], Any]]] = {
    "uvicorn": uvicorn_app,
    "fastapi": fastapi_app,
    "bert": bert_app,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=APPS)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = parse_settings(json.loads(given.settings.read_text()), origin=str(given.settings))
    uvicorn.run(
        APPS[given.name](settings),
        port=given.port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
