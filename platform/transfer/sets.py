"""What a transfer set is: rows made from logged rows, with the story of how (papers.md S3.15)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    import pyarrow as pa

    from driftline.platform.text import Tokenizer


@dataclass(frozen=True)
class TransferSource:
    """What a transfer set is made from."""

    frame: "pa.Table"
    """Rows with features, in order of time; see ``columns``. Text does not travel in frames."""
    texts: "pa.Table"
    """``text_id`` (int64, ascending) and one string column for each text feature."""
    tokenizer: "Tokenizer"


@dataclass(frozen=True)
class TransferRows:
    """The rows to ask the teacher about, in the form of the source."""

    frame: "pa.Table"
    """Same schema as the source's frame. Rows keep the event time of the row they come from."""
    texts: "pa.Table"
    """Every text the frame points to; new texts have new ids, ascending."""
    has_clicks: bool
    """False where rows were made up: their ``clicked`` means nothing (alpha is then 1)."""
    provenance: dict[str, Any]
    """Plain values: the kind and its settings, seed, counts of rows, texts and tokens."""


class TransferSet(Kind):
    """Base of all transfer sets."""

    @abstractmethod
    def build(self, source: TransferSource, *, seed: int) -> TransferRows:
        """Make the set; the same source and seed give the same rows."""


class Natural(TransferSet):
    """The logged rows as they are (papers.md S3.15)."""

    kind: Literal["natural"] = "natural"

    def build(self, source: TransferSource, *, seed: int) -> TransferRows:
        """The source's own rows."""
        return TransferRows(source.frame, source.texts, True, self.model_dump(mode="json"))
