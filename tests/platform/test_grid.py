from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import BertConfig, BertForPreTraining, BertModel

from driftline.platform.models.build import build_model, count_parameters
from driftline.platform.models.grid import (
    MEBIBYTE,
    NAMED,
    BertSize,
    grid,
    grid_rows,
    named_size,
)
from driftline.platform.models.sizes import PartSize, median_seconds, part_sizes, size_table
from driftline.platform.models.spec import SingleSpec, encoder_spec
from driftline.platform.settings import ConfigEncoder, StudentSettings, TeacherSettings

# papers.md S1.9, in millions, with all heads; rows are layers, columns widths.
PUBLISHED = {
    2: (4.4, 9.7, 22.8, 39.2),
    4: (4.8, 11.3, 29.1, 53.4),
    6: (5.2, 12.8, 35.4, 67.5),
    8: (5.6, 14.4, 41.7, 81.7),
    10: (6.0, 16.0, 48.0, 95.9),
    12: (6.4, 17.6, 54.3, 110.1),
}
TRUNCATED = {(6, 768), (8, 768)}  # 67.58 and 81.75 are printed without rounding


def test_the_grid_has_the_published_counts_in_all_24_cells() -> None:
    cells = {(size.num_layers, size.hidden_size): size for size in grid()}
    assert len(cells) == 24
    for num_layers, row in PUBLISHED.items():
        for hidden_size, published in zip((128, 256, 512, 768), row, strict=True):
            millions = cells[num_layers, hidden_size].num_parameters(heads=True) / 1e6
            if (num_layers, hidden_size) in TRUNCATED:
                assert int(10 * millions) / 10 == published
            else:
                assert round(millions, 1) == published


def test_the_counts_of_the_fixtures_are_exact() -> None:  # papers.md T.5
    assert BertSize(2, 128).num_parameters() == 4_385_920
    assert BertSize(12, 768).num_parameters() == 109_482_240
    assert BertSize(12, 768).num_parameters(heads=True) == 110_106_428
    assert BertSize(6, 768).num_parameters() == 66_955_008
    assert BertSize(6, 768).num_parameters(pooler=False) == 66_364_416
    assert round(BertSize(6, 768, vocabulary_size=32_000).num_parameters() / 1e6, 1) == 68.1


def test_sizes_on_disk_and_the_split_are_those_of_the_thesis() -> None:  # papers.md S3.2, S3.3
    teacher, student = BertSize(12, 768), BertSize(6, 768)
    assert int(teacher.disk_bytes() / MEBIBYTE) == 417
    assert int(student.disk_bytes(pooler=False) / MEBIBYTE) == 253
    assert round(teacher.embedding_parameters / 1e6, 1) == 23.8
    assert round(teacher.layer_parameters / 1e6, 1) == 85.1
    assert round(student.layer_parameters / 1e6, 1) == 42.5


@pytest.mark.parametrize("size", grid(), ids=lambda size: size.name)
def test_counts_equal_those_of_the_real_modules(size: BertSize) -> None:
    config = BertConfig(
        vocab_size=size.vocabulary_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.hidden_size,
    )
    with torch.device("meta"):
        whole, encoder = BertForPreTraining(config), BertModel(config)
    assert counted(whole) == size.num_parameters(heads=True)
    assert counted(encoder) == size.num_parameters()
    assert counted(encoder.embeddings) == size.embedding_parameters
    assert counted(encoder.encoder) == size.layer_parameters


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_our_own_encoders_are_of_the_grid_without_pooler() -> None:
    for name in NAMED:
        settings = ConfigEncoder.model_validate({"size": name})
        spec = SingleSpec(encoder=encoder_spec(settings, vocabulary_size=32_000))
        width = settings.hidden_size
        classifier = 2 * width + width**2 + width + 2 * width + 2
        expected = named_size(name, vocabulary_size=32_000).num_parameters(pooler=False)
        assert count_parameters(spec) == expected + classifier


def test_the_table_names_what_has_a_name() -> None:
    rows = grid_rows()
    assert [row["name"] for row in rows if "/" not in str(row["name"])] == [*NAMED]
    assert [row["hidden_size"] for row in rows] == sorted(int(r["hidden_size"]) for r in rows)
    for row in rows:
        assert row["num_parameters_without_pooler"] == (
            int(row["embedding_parameters"]) + int(row["encoder_parameters"])
        )


# --- settings -----------------------------------------------------------------------------


def test_an_encoder_can_be_named_by_its_size() -> None:
    student = StudentSettings.model_validate({"encoder": {"size": "mini", "max_tokens": 32}})
    assert student.encoder == ConfigEncoder(num_layers=4, hidden_size=256, max_tokens=32)
    teacher = TeacherSettings.model_validate({"encoder": {"kind": "config", "size": "base"}})
    assert teacher.encoder == ConfigEncoder(num_layers=12, hidden_size=768)
    again = StudentSettings.model_validate_json(student.model_dump_json())
    assert again == student


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"size": "huge"}, "size must be one of tiny, mini, small, medium, base, got 'huge'"),
        ({"size": "mini", "num_layers": 3}, "size 'mini' says num_layers, hidden_size already"),
        ({"size": ["mini"]}, "size must be one of"),
    ],
)
def test_a_size_that_is_none_or_says_things_twice_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TypeAdapter(ConfigEncoder).validate_python(raw)


# --- size of any model --------------------------------------------------------------------


def test_parts_add_up_to_the_whole_at_every_depth(tiny_market: Any) -> None:
    for spec in (tiny_market.twin, tiny_market.teacher, tiny_market.mlp):
        model = build_model(spec)
        sizes = {part.name: part for part in part_sizes(model, max_depth=3)}
        assert sizes[""].num_parameters == counted(model) == count_parameters(spec)
        assert sizes[""].num_bytes == 4 * counted(model)
        for name, part in sizes.items():
            below = [p for n, p in sizes.items() if n and n.rpartition(".")[0] == name]
            if below:
                assert sum(p.num_parameters for p in below) == part.num_parameters
                assert sum(p.share for p in below) == pytest.approx(part.share)


def test_a_tied_tensor_counts_once_and_says_so() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "output": nn.Linear(4, 10)})
    model["output"].weight = model["table"].weight
    assert {part.name: part for part in part_sizes(model)} == {
        "": PartSize("", 50, 200, 1.0),
        "table": PartSize("table", 40, 160, 0.8),
        "table.weight": PartSize("table.weight", 40, 160, 0.8),
        "output": PartSize("output", 10, 40, 0.2),
        "output.weight": PartSize("output.weight", 0, 0, 0.0, "table.weight"),
        "output.bias": PartSize("output.bias", 10, 40, 0.2),
    }
    table = size_table(model)
    assert "shared with table.weight" in table
    assert len({line.index("%") for line in table.splitlines() if "%" in line}) == 1


def test_a_model_of_any_size_is_measured_without_memory() -> None:
    settings = ConfigEncoder(num_layers=24, hidden_size=2240, max_tokens=512)
    spec = SingleSpec(encoder=encoder_spec(settings, vocabulary_size=32_000))
    with torch.device("meta"):
        parts = part_sizes(build_model(spec, pretrained=False), max_depth=0)
    assert round(parts[0].num_parameters / 1e9, 2) == 1.52  # papers.md S0.8


def test_time_is_taken_after_a_first_call() -> None:
    calls: list[bool] = []
    seconds = median_seconds(lambda: calls.append(torch.is_grad_enabled()), num_repeats=4)
    assert calls == 5 * [False]
    assert seconds >= 0
