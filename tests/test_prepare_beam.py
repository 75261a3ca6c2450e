"""The preparation under Apache Beam's direct runner: the same records as without it."""

import json

import numpy as np
import pytest
from prepare_fakes import open_fakes, without_networks
from test_prepare_runs import command, make_input, records_of

from fantasy_jax.data.records import read_metadata
from fantasy_jax.prepare.command import main

pytest.importorskip("apache_beam", reason="pip install '.[beam]'")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Beam and its imports
def test_a_pipeline_writes_the_same_records(tmp_path, config_file):
    folder = make_input(tmp_path / "videos")
    here, there = tmp_path / "here", tmp_path / "there"
    options = ["--beam=--runner=DirectRunner --direct_num_workers=1"]
    import fantasy_jax.prepare.beam  # noqa: F401  its networks are replaced

    with without_networks():
        assert main(command(folder, here, config_file), open_detectors=open_fakes) == 0
        arguments = [x for x in command(folder, there, config_file, *options) if x != "--processes=1"]
        assert main(arguments, open_detectors=open_fakes) == 0
    assert (there / "motion.json").read_text() == (here / "motion.json").read_text()
    one, other = (records_of(out / "encoded_clips/1.0.0") for out in (here, there))
    assert {split: len(records) for split, records in one.items()} == {
        split: len(records) for split, records in other.items()
    }
    for split in one:
        pairs = zip(
            *(sorted(r[split], key=lambda x: x["waveform"].tobytes()) for r in (one, other)), strict=True
        )
        for a, b in pairs:
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)
    schemas = (json.loads((out / "encoded_clips/1.0.0/features.json").read_text()) for out in (here, there))
    assert next(schemas) == next(schemas)
    assert read_metadata(here / "encoded_clips/1.0.0") == read_metadata(there / "encoded_clips/1.0.0")
    assert "mute.mp4: " in (there / "report.html").read_text()
