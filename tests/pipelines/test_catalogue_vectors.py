"""Products that come between two refreshes, through the command and into the next bundle."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from driftline.pipelines.cli import main
from driftline.pipelines.refresh_head import refresh_head
from driftline.pipelines.replay import log_split
from driftline.platform.bundle import Bundle
from driftline.platform.registry import read_champion
from driftline.platform.settings import DriftlineSettings
from driftline.platform.vector_deltas import DeltaReader, known_vectors
from driftline.platform.windows import HOUR, format_time
from driftline.platform.workspace import Workspace


def test_encoded_texts_go_into_the_cache_of_the_next_head_refresh(
    market: DriftlineSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = Workspace.of(market).bundles
    pointer = read_champion(bundles)
    assert pointer is not None
    champion = Bundle.open(pointer.path)
    config = tmp_path / "market.yaml"
    config.write_text(yaml.safe_dump(market.model_dump(mode="json")))
    moment = log_split(market).id.start + HOUR
    early = format_time(moment - HOUR / 2)

    for until in (early, format_time(moment)):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["catalogue", "encode", str(config), "--as-of", until, "--json"])

    first, second = (json.loads(line) for line in _objects(capsys.readouterr().out))
    assert [one["bundle"] for one in first["bundles"]] == [champion.fingerprint]
    reader = DeltaReader(champion)
    assert reader.look()
    encoded = [one["bundles"][0]["num_texts"] for one in (first, second)]
    assert [len(delta.vectors.text_id) for delta in reader.deltas] == [n for n in encoded if n]
    assert sum(encoded) > 0
    late = known_vectors(champion)
    assert len(late.text_id) == len(champion.vectors.text_id) + sum(encoded)

    record = refresh_head(market, as_of=moment)

    after = Bundle.open(bundles / record.bundle).vectors
    assert set(late.text_id) <= set(after.text_id)
    rows = after.rows(late.text_id)
    np.testing.assert_array_equal(after.page[rows], late.page)
    np.testing.assert_array_equal(after.ad[rows], late.ad)


def _objects(text: str) -> list[str]:
    """The JSON objects that were printed, one after the other."""
    decoder = json.JSONDecoder()
    found = []
    while text := text.strip():
        _, end = decoder.raw_decode(text)
        found.append(text[:end])
        text = text[end:]
    return found
