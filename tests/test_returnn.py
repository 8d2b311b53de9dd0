"""RETURNN as it is on PyPI, with ``use_cache_manager``, gets its data by ``cf`` from a peer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.box import require
from tests.cf_cluster import CfCluster

pytestmark = [pytest.mark.box, pytest.mark.slow]

# Writes an HDF file and a zip file with one sequence each.
WRITE = """
import io, sys, wave, zipfile
import numpy
from returnn.datasets.hdf import SimpleHDFWriter

hdf, ogg_zip = sys.argv[1:]
writer = SimpleHDFWriter(hdf, dim=3, ndim=2)
features = numpy.arange(12, dtype="float32").reshape(1, 4, 3)
writer.insert_batch(features, seq_len=[4], seq_tag=["seq-0"])
writer.close()
sound = io.BytesIO()
with wave.open(sound, "wb") as audio:
    audio.setnchannels(1)
    audio.setsampwidth(2)
    audio.setframerate(16000)
    audio.writeframes(bytes(2) * 1600)
with zipfile.ZipFile(ogg_zip, "w") as file:
    file.writestr("corpus.txt", repr([{"text": "hi", "duration": 0.1, "file": "seq.wav"}]))
    file.writestr("corpus/seq.wav", sound.getvalue())
"""
# Loads them as a training would.
READ = """
import json, sys
from returnn.datasets.basic import init_dataset
from returnn.log import log

log.initialize(verbosity=[])
hdf, ogg_zip = sys.argv[1:]
datasets = [
    init_dataset({"class": "HDFDataset", "files": [hdf], "use_cache_manager": True}),
    init_dataset({
        "class": "OggZipDataset",
        "path": [ogg_zip],
        "use_cache_manager": True,
        "audio": {"features": "raw"},
        "targets": None,
    }),
]
found = {"files": [*datasets[0].files, *datasets[1].paths], "data": []}
for dataset in datasets:
    dataset.init_seq_order(epoch=1)
    dataset.load_seqs(0, 1)
    found["data"].append(dataset.get_data(0, "data").tolist())
print(json.dumps(found))
"""


@pytest.fixture
def it(tmp_path: Path) -> Iterator[CfCluster]:
    require()
    with CfCluster(tmp_path) as made:
        yield made


def test_both_kinds_of_datasets_are_read_from_copies_that_came_from_a_peer(it: CfCluster) -> None:
    files = [it.box.export / "train.hdf", it.box.export / "corpus.zip"]
    subprocess.run([sys.executable, "-c", WRITE, *files], check=True)
    copies = [it.get(it.here, file) for file in files]
    read_bytes = it.box.file_server.bytes_read()

    # RETURNN calls cf only where it takes itself to be in a job of the cluster.
    job = it.a.start(
        [sys.executable, "-c", READ, *files],
        env={"PATH": f"{it.program.parent}:/usr/bin:/bin", "SLURM_JOB_ID": "1"},
        log="returnn",
    )

    assert job.wait(90) == 0, job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    assert found["files"] == [str(copy).replace(it.here.name, it.a.name) for copy in copies]
    assert found["data"] == [
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0], [9.0, 10.0, 11.0]],
        [[0.0]] * 1600,
    ]
    assert job.stderr.count("LOG: copied peers:") == 2
    assert it.box.file_server.bytes_read() == read_bytes
