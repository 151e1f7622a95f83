"""What all tests share: one local Ray for the session, and Hypothesis without a deadline."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

hypothesis_settings.register_profile("driftline", deadline=None)  # a first call into torch is slow
hypothesis_settings.load_profile("driftline")

# Read when Ray starts: no usage report leaves the machine, and no warning about accelerators.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Tests are many small tensors on two cores; a thread a process is the fastest and repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A real local Ray with two CPUs, in a folder of its own; shut down at the end.

    The folder has a short name because the path of a Unix socket holds only about 100 bytes.
    """
    import ray

    with tempfile.TemporaryDirectory(prefix="dl-ray-", ignore_cleanup_errors=True) as temp_dir:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(Path(temp_dir).resolve()),
        )
        yield
        ray.shutdown()
