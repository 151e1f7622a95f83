"""Bulk inference: cached [CLS] vectors and teacher logits, batched by length.

Shape suffixes: B texts of a batch, H vector width, N rows or texts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

from driftline.platform.artefacts import whole_file
from driftline.platform.batching import Rows, by_length
from driftline.platform.checkpoints import load_weights
from driftline.platform.devices import Precision, autocast, choose_device
from driftline.platform.examples import Float32, Ragged, open_texts
from driftline.platform.inputs import ClickInputs, frame_texts
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import ModelSpec, TwinSpec
from driftline.platform.models.student import AD, PAGE, TwinStudent
from driftline.platform.tasks import INFERENCE_TOKENS, inference_batches

Progress = Callable[[int, int], None]


def load_model(spec: ModelSpec, *weights: Path) -> nn.Module:
    """A model for inference, on the accelerator if there is one; later files win.

    Raises:
        BundleError: the weights belong to a model of another shape.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model = build_model(spec, pretrained=False)
    load_weights(model, *weights)
    return model.to(choose_device()).eval().requires_grad_(False)


def encode_tokens(
    model: nn.Module,
    spec: TwinSpec,
    tokens: Ragged,
    *,
    role: int,
    precision: Precision = "off",
    progress: Progress | None = None,
) -> Float32:
    """[CLS] vectors of texts in a role (0 page, 1 ad), in order. ``[N, H]``."""
    assert isinstance(model, TwinStudent), "encode_tokens needs a twin student"
    device = next(model.parameters()).device
    vectors_NH = np.empty((len(tokens), spec.encoder.hidden_size), np.float32)
    marker = role if spec.tie_arms else None
    lengths = np.minimum(tokens.lengths, spec.encoder.max_tokens)
    done = 0
    for rows in by_length(lengths, max_tokens=INFERENCE_TOKENS, width=3):
        tokens_BT, mask_BT = frame_texts(spec.encoder, tokens, rows, role=marker)
        with torch.inference_mode(), autocast(device, precision):
            vectors_BH = model.arms.encode(tokens_BT.to(device), mask_BT.to(device), role)
        vectors_NH[rows] = vectors_BH.float().cpu().numpy()
        done += len(rows)
        if progress is not None:
            progress(done, len(tokens))
    return vectors_NH


def encode_texts(
    model: nn.Module,
    spec: TwinSpec,
    texts: Path,
    destination: Path,
    *,
    precision: Precision = "off",
    progress: Progress | None = None,
) -> int:
    """Cache the vectors of all texts in both roles: ``text_id`` ascending, ``page``, ``ad``.

    Source: papers.md S0.11. Returns the number of texts; the file is written whole or not at all.
    """
    opened = open_texts(texts)
    order = np.argsort(opened.text_id, kind="stable")
    total = 2 * len(order)
    vectors = {}
    for role, name in ((PAGE, "page"), (AD, "ad")):
        vectors[name] = encode_tokens(
            model,
            spec,
            opened.tokens,
            role=role,
            precision=precision,
            progress=_shifted(progress, role * len(order), total),
        )[order]
    with whole_file(destination) as scratch:
        save_file({"text_id": opened.text_id[order], **vectors}, scratch)
    return len(order)


def predict_logits(
    model: nn.Module,
    inputs: ClickInputs,
    *,
    rows: Rows | None = None,
    precision: Precision = "off",
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Logits of (no click, click) of any click model, in the order of ``rows``. ``[N, 2]``.

    The teacher's soft labels are these logits over serialised rows: temperature-free, so that
    every strategy can soften them as it likes.

    Args:
        model: From ``load_model``.
        inputs: From ``open_inputs``, or built from rows in memory.
        rows: Which rows; all when not given.
        precision: Precision of the matrix products.
        progress: Called with rows done and rows in all.
    """
    wanted = np.arange(inputs.num_rows) if rows is None else rows
    device = next(model.parameters()).device
    logits_N2 = np.empty((len(wanted), 2), np.float32)
    done = 0
    for places in inference_batches(inputs, wanted):
        with torch.inference_mode(), autocast(device, precision):
            batch = inputs.logits(model, wanted[places], device=device)
        logits_N2[places] = batch.float().cpu().numpy()
        done += len(places)
        if progress is not None:
            progress(done, len(wanted))
    return logits_N2


def _shifted(progress: Progress | None, offset: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(offset + done, total)
