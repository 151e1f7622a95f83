"""A planned retrieval, as Feast hands it to its callers."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage


class AsofRetrievalJob(RetrievalJob):
    """A planned retrieval; every reading runs it anew, on a connection of its own."""

    def __init__(
        self,
        run: Callable[[], pa.Table],
        *,
        config: RepoConfig,
        full_feature_names: bool = False,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        """Keep ``run`` for later."""
        super().__init__()
        self._run = run
        self._config = config
        self._full_feature_names = full_feature_names
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        """Whether columns are called ``view__feature``."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """None: the store refuses them."""
        return []

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """What was asked for; none for a pull."""
        return self._metadata

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Write the result as one Parquet file, complete or not at all."""
        target = Path(
            FileSource.get_uri_for_file_path(
                repo_path=self._config.repo_path, uri=storage.to_data_source().path
            )
        )
        if target.exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            pq.write_table(self.to_arrow(timeout=timeout), partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._run()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._run().to_pandas()
