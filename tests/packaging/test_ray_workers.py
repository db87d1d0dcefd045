"""Workers of a cluster that was there before get the driver's own code, under the one name."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.packaging.conftest import CLUSTER_ENVIRONMENT, copy_product, run

ASK = """
import models, ray
from glm_batch.pipelines.cluster.cluster import cluster

@ray.remote(num_cpus=0)
def found():
    import glm_batch.jobs.commands, glm_batch.models.version as mine
    return mine.__file__, mine.__version__

with cluster():
    print(*ray.get(found.remote()))
"""


def test_workers_get_the_drivers_code(tmp_path: Path, users_folder: Path, ray_address: str) -> None:
    """Through the links below src, and whatever of that name is installed where they run."""
    (tmp_path / "mine").mkdir()
    product = copy_product(tmp_path / "mine")
    (product / "models" / "version.py").write_text('__version__ = "of-this-driver"\n')
    path, version = run(
        sys.executable,
        "-c",
        ASK,
        cwd=users_folder,
        PYTHONPATH=str(product / "src"),
        RAY_ADDRESS=ray_address,
        **CLUSTER_ENVIRONMENT,
    ).split()
    assert version == "of-this-driver"
    assert not Path(path).is_relative_to(tmp_path)
