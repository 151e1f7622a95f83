"""One model over several workers: whole in each (DDP), or cut between them (FSDP2).

The same code runs over nccl on accelerators and over gloo on processors. Products run under
autocast on float32 weights, so that a sharded stage learns what one worker learns; gathering
weights in bfloat16 would halve the traffic and change the result.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel

from driftline.platform.models.encoder import text_encoders
from driftline.platform.models.student import TextArms
from driftline.platform.settings import StageSettings


def place(model: nn.Module, stage: StageSettings, *, device: torch.device) -> nn.Module:
    """Move a model to its device; cut it between the workers where the stage asks for it.

    All workers hold the same model before. A sharded one moves layer by layer, so that the whole
    never stands on the device, and keeps names and shapes of its weights.
    """
    if stage.sharding == "off" or not _several():
        return model.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _layers_of_their_own(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def distribute(model: nn.Module) -> nn.Module:
    """What a training step calls: the model itself, or its gradients summed over the workers."""
    if not _several() or is_sharded(model):
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def is_sharded(model: nn.Module) -> bool:
    """Each worker holds a part of every weight."""
    return isinstance(model, FSDPModule)


@contextmanager
def summed(forward: nn.Module, *, across_workers: bool) -> Iterator[None]:
    """Gradients of a batch that is not the last of its step stay with their worker."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(across_workers)
        yield
    elif isinstance(forward, DistributedDataParallel) and not across_workers:
        with forward.no_sync():
            yield
    else:
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Evaluation: no gradients, and every worker holds all weights for the length of a block.

    Workers may then call the model as often as each of them likes.
    """
    if not isinstance(model, FSDPModule):
        with torch.inference_mode():
            yield
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        with torch.no_grad():  # FSDP's hooks do not run under inference_mode
            yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _layers_of_their_own(model: nn.Module) -> list[nn.Module]:
    """Layers that are gathered and forgotten one after the other.

    Not those of twin arms: workers encode texts in different numbers of groups, so a layer would be
    called more often in one than in another, and gathering waits for all; twin students are one
    piece. Nor a BERT's last layer, of which [CLS] needs only parts: it goes with the embeddings.
    """
    if any(isinstance(module, TextArms) for module in model.modules()):
        return []
    found: list[nn.Module] = []
    for encoder in text_encoders(model):
        layers = list(encoder.layers)
        found += layers[:-1] if isinstance(encoder.backbone, BertModel) else layers
    return found
