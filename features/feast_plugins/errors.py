"""The error of the store plug-ins."""

from driftline.platform.errors import DriftlineError


class FeatureStoreError(DriftlineError):
    """A feature source, a retrieval or a snapshot that cannot be used as asked."""
