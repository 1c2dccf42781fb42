"""Power cuts of a whole run, files beside the store included: real file systems over a drive that records.

``MEGATRAIN_SOAK_IMAGES`` is the number of images of each file system; ``make soak`` takes 70, which are 210 in all.
"""

import json
import os
import random

import pytest

from filesystems import KINDS, MIB, Volume
from megatrain_io.errors import InterruptedRunError
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.open_store import open_store
from megatrain_io.training.callbacks import Callback
from paged import differing
from recorded_drive import recorded_volume
from runs import ENGINE, STEPS, configured, figures, metrics_of, planes_of, start

IMAGES = int(os.environ.get("MEGATRAIN_SOAK_IMAGES", "3"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 20 * IMAGES)]


class Marks(Callback):
    """Marks what the command has acknowledged: the import, and each other step, which it waits for."""

    def __init__(self, recording):
        self._recording = recording

    def on_start(self, run):
        if run.step == 0:
            self._recording.mark("0")

    def on_step(self, run, report):
        if report.step % 2 == 1:
            run.wait_durable()
            self._recording.mark(str(report.step))


def record(source, run, recording):
    """Import, three steps, an interruption, and the rest."""
    config, marks = configured(source, run), Marks(recording)
    with pytest.raises(InterruptedRunError):
        start(config, stop=3, callbacks=[marks])
    recording.mark("3")
    start(config, resume=True, callbacks=[marks])
    recording.mark(str(STEPS))


def check(source, run, whole, marks, what):
    """What a person finds after the cut, and that the same command goes on with it to the same end."""
    acknowledged = int(marks[-1]) if marks else None
    if acknowledged is not None:
        with open_store(RunFolder(run), engine=ENGINE) as state:
            step = json.loads(state.blob)["step"]
        assert acknowledged <= step <= acknowledged + 2, what
    if acknowledged is None or step < STEPS:
        start(configured(source, run), resume=acknowledged is not None)
    losses = {line["step"]: line["loss"] for line in metrics_of(run)}
    expected = {step: loss for step, _, loss, *_ in figures(whole[0])}
    if acknowledged == STEPS or (acknowledged is not None and step == STEPS):
        # Its line is made anew by a start, and there was none.
        expected = {step: loss for step, loss in expected.items() if step < STEPS or step in losses}
    assert losses == expected, what
    assert differing(planes_of(run), whole[1]) == [], what


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_at_any_moment_leaves_a_run_that_goes_on(kind, source, whole, tmp_path):
    """``run.json`` was gone after one just after the import; and a line of metrics, although a later step was there."""
    seed = random.SystemRandom().randrange(1 << 32)
    with recorded_volume(kind, tmp_path, 320 * MIB) as (volume, recording):
        record(source, volume.folder / "run", recording)
    for image, marks, what in recording.cuts(IMAGES, seed, tmp_path):
        cut = Volume(kind, image, volume.folder)
        try:
            cut.mount()
            check(source, cut.folder / "run", whole, marks, f"{kind}, {what}")
            cut.unmount()
        finally:
            cut.tear_down()
