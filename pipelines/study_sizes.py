"""Trials without training: how large an encoder is, and how long it takes to read a text."""

from typing import Final

import torch

from driftline.pipelines.study_results import Trial
from driftline.platform.errors import SettingsError
from driftline.platform.models.encoder import TextEncoder
from driftline.platform.models.grid import MEBIBYTE, BertSize
from driftline.platform.models.sizes import median_seconds
from driftline.platform.models.spec import encoder_spec
from driftline.platform.settings import ConfigEncoder, DriftlineSettings

NUM_REPEATS: Final = 5


def measure_size(settings: DriftlineSettings, *, cell: str, seed: int) -> Trial:
    """Parameters, memory and seconds of ``student.encoder`` for one text of its full length.

    Parameters are counted with pooler and pre-training heads, as the papers count (papers.md
    S1.10); what is timed is the encoder as we serve it, in batches of one (S1.9).

    Raises:
        SettingsError: the encoder is a checkpoint.
    """
    encoder = settings.student.encoder
    if not isinstance(encoder, ConfigEncoder):
        raise SettingsError("form encoder measures encoders of kind 'config', got a checkpoint")
    vocabulary_size = settings.tokenizer.vocabulary_size
    size = BertSize(encoder.num_layers, encoder.hidden_size, vocabulary_size=vocabulary_size)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = TextEncoder(encoder_spec(encoder, vocabulary_size=vocabulary_size)).eval()
        tokens_BT = torch.randint(vocabulary_size, (1, encoder.max_tokens))
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    measures = {
        "num_parameters": float(size.num_parameters(heads=True)),
        "num_encoder_parameters": float(size.layer_parameters),
        "num_embedding_parameters": float(size.embedding_parameters),
        "model_mib": size.disk_bytes(pooler=False) / MEBIBYTE,
        "encode_seconds": median_seconds(
            lambda: model.cls(tokens_BT, mask_BT), num_repeats=NUM_REPEATS
        ),
    }
    return Trial(cell, seed, measures, notes=dict(size.row()))
