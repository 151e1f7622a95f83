"""Text encoders from ``transformers``, and the masked-language head that pre-trains them.

``transformers`` takes seconds to import, and is imported when an encoder is made: a replica, which
needs none for texts that its bundle knows, is up sooner without.

Shape suffixes: B sequences, T tokens, H hidden width, K masked positions, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from driftline.platform.errors import SettingsError
from driftline.platform.models.spec import EncoderSpec

if TYPE_CHECKING:
    from transformers import BertConfig

NUM_POSITIONS: Final = 512  # BERT's own; at least the longest sequence
MaskedTexts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Masked tokens ``[B, T]``, mask of real tokens ``[B, T]``, places ``[K]``, true tokens ``[K]``."""


class TextEncoder(nn.Module):
    """A BERT-like encoder; ``forward`` gives every position, ``cls`` the first one.

    A new model of a checkpoint spec starts from the checkpoint's weights (safetensors only,
    local files only); its token table grows by the two role markers.
    """

    whole_last_layer = False
    """``cls`` computes the last layer at every position, for whoever looks at it by hooks."""

    def __init__(self, spec: EncoderSpec, *, pretrained: bool = True) -> None:
        from transformers import AutoConfig, AutoModel, BertModel

        super().__init__()
        self.spec = spec
        self.num_tokens = 0
        """Tokens read with a gradient in mind, padding included; see ``take_num_tokens``."""
        self.forgetful = False
        """See ``checkpoint_activations``."""
        if spec.architecture is None:
            self.backbone: nn.Module = BertModel(_bert_config(spec), add_pooling_layer=False)
        elif spec.checkpoint is not None and pretrained:
            self.backbone = _load_checkpoint(spec)
        else:
            config = AutoConfig.for_model(**spec.architecture)
            config.vocab_size = spec.vocabulary_size
            self.backbone = AutoModel.from_config(config, attn_implementation="sdpa")
        _drop_pooler(self.backbone)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Last layer at every position.

        Args:
            tokens_BT: Token ids with [CLS] first. ``[B, T]``, int64.
            mask_BT: True where there is a token. ``[B, T]``, bool.

        Returns:
            ``[B, T, H]``.
        """
        self._count(tokens_BT)
        states: Tensor = self.backbone(tokens_BT, attention_mask=mask_BT).last_hidden_state
        return states

    def cls(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Vector of the [CLS] position. ``[B, H]``.

        A BERT's last layer is computed for that one position, which saves most of its work; the
        result is that of ``forward``.
        """
        from transformers import BertModel

        if self.whole_last_layer or not isinstance(self.backbone, BertModel):
            whole_BTH: Tensor = self(tokens_BT, mask_BT)
            return whole_BTH[:, 0]
        self._count(tokens_BT)
        *layers, last = self.backbone.encoder.layer
        states_BTH = self.backbone.embeddings(input_ids=tokens_BT)
        visible_B11T = mask_BT[:, None, None, :]
        for layer in layers:
            states_BTH = layer(states_BTH, attention_mask=visible_B11T)
        if self.forgetful and self.training:
            vectors_BH: Tensor = checkpoint(
                _first_position, last, states_BTH, visible_B11T, use_reentrant=False
            )
            return vectors_BH
        return _first_position(last, states_BTH, visible_B11T)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers.

        Raises:
            SettingsError: the checkpoint's architecture keeps them elsewhere.
        """
        return _layers(self.backbone)

    def checkpoint_activations(self) -> None:
        """Keep only the input of each layer while training, and compute the rest again.

        Each layer's ``forward`` is wrapped, not its call: hooks on a layer fire once.
        """
        if self.forgetful:
            return
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.forgetful = True

    def _count(self, tokens_BT: Tensor) -> None:
        if torch.is_grad_enabled():
            self.num_tokens += tokens_BT.numel()

    @property
    def token_table(self) -> Tensor:
        """Token embeddings. ``[V, H]``."""
        embeddings = self.backbone.get_input_embeddings()  # type: ignore[operator]
        weight = embeddings.weight
        assert isinstance(weight, Tensor)
        return weight


class MaskedLanguageHead(nn.Module):
    """BERT's prediction head, tied to the token table; dropped after pre-training (S0.8, A0.18)."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.dense = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.norm = nn.LayerNorm(spec.hidden_size)
        self.bias = nn.Parameter(torch.zeros(spec.vocabulary_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states_KH: Tensor, table_VH: Tensor) -> Tensor:
        """Scores of all tokens at the masked positions only. ``[K, V]``."""
        hidden_KH = self.norm(gelu(self.dense(states_KH)))
        return linear(hidden_KH, table_VH, self.bias)


class MaskedLanguageModel(nn.Module):
    """Encoders with a shared prediction head, for pre-training only (papers.md S0.7, A0.18)."""

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.predictor = MaskedLanguageHead(encoders[0].spec)

    def forward(self, parts: Sequence[MaskedTexts]) -> Tensor:
        """Loss at every masked position of all parts, float32. ``[K]``.

        Args:
            parts: For each encoder in order: masked tokens, mask of real tokens, flat places of
                the masked positions in ``[B * T]`` and the tokens that stood there. An encoder
                may have several parts: part n belongs to encoder ``n % len(encoders)``.
        """
        losses = []
        for number, (tokens_BT, mask_BT, place_K, target_K) in enumerate(parts):
            encoder = self.encoders[number % len(self.encoders)]
            assert isinstance(encoder, TextEncoder)
            states_KH = encoder(tokens_BT, mask_BT).flatten(0, 1)[place_K]
            scores_KV = self.predictor(states_KH, encoder.token_table)
            losses.append(cross_entropy(scores_KV.float(), target_K, reduction="none"))
        return torch.cat(losses)


def checkpoint_activations(model: nn.Module) -> None:
    """Turn on activation checkpointing in all encoders of a model.

    Raises:
        SettingsError: there is no encoder, or its layers were not found.
    """
    encoders = text_encoders(model)
    if not encoders:
        raise SettingsError(
            f"activation_checkpointing needs an encoder, {type(model).__name__} has none; "
            "turn it off for this stage"
        )
    for encoder in encoders:
        encoder.checkpoint_activations()


def take_num_tokens(model: nn.Module) -> int:
    """Tokens that a model's encoders were trained on since the last call."""
    encoders = text_encoders(model)
    total = sum(encoder.num_tokens for encoder in encoders)
    for encoder in encoders:
        encoder.num_tokens = 0
    return total


def text_encoders(model: nn.Module) -> list[TextEncoder]:
    """All encoders of a model, each once."""
    return [module for module in model.modules() if isinstance(module, TextEncoder)]


def _bert_config(spec: EncoderSpec) -> "BertConfig":
    from transformers import BertConfig

    return BertConfig(
        vocab_size=spec.vocabulary_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        intermediate_size=4 * spec.hidden_size,
        max_position_embeddings=max(NUM_POSITIONS, spec.max_tokens),
        hidden_dropout_prob=spec.dropout,
        attention_probs_dropout_prob=spec.attention_dropout,
        pad_token_id=spec.specials.pad,
        attn_implementation="sdpa",
    )


def _first_position(layer: nn.Module, states_BTH: Tensor, visible_B11T: Tensor) -> Tensor:
    """One BERT layer at position 0, which attends to all positions. ``[B, H]``."""
    attention: Any = layer.attention
    own: Any = attention.self
    first_B1H = states_BTH[:, :1]

    def heads(states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], -1, own.attention_head_size).transpose(1, 2)

    mixed = scaled_dot_product_attention(
        heads(own.query(first_B1H)),
        heads(own.key(states_BTH)),
        heads(own.value(states_BTH)),
        attn_mask=visible_B11T,
        dropout_p=own.dropout.p if own.training else 0.0,
    )
    mixed_B1H = attention.output(mixed.transpose(1, 2).flatten(2), first_B1H)
    whole: Tensor = layer.feed_forward_chunk(mixed_B1H)  # type: ignore[operator]
    return whole[:, 0]


def _load_checkpoint(spec: EncoderSpec) -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(
        spec.checkpoint,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    if spec.checkpoint_layers is not None:
        _pick_layers(model, spec.checkpoint_layers)
    model.resize_token_embeddings(spec.vocabulary_size, mean_resizing=False)  # type: ignore[operator]
    return model.train()


def _pick_layers(model: nn.Module, layers: Sequence[int]) -> None:
    whole = _layers(model)
    picked = nn.ModuleList(whole[layer - 1] for layer in layers)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is whole:
                setattr(parent, name, picked)
    config: Any = model.config
    config.num_hidden_layers = len(layers)


def _layers(backbone: nn.Module) -> nn.ModuleList:
    config: Any = backbone.config
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise SettingsError(
        f"no list of {config.num_hidden_layers} layers was found in {type(backbone).__name__}; "
        "it cannot be cut into layers, sharded by layer, or checkpoint its activations"
    )


def _drop_pooler(backbone: nn.Module) -> None:
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # type: ignore[assignment]
