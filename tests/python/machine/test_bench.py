"""The bench: decisions about made-up rates, the profile as a file, and one short measurement of this machine."""

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.errors import ConfigError, MegatrainIoError, NoSpaceError, StorageError, UnsupportedError
from megatrain_io.machine import bench, doctor, drive, measure
from megatrain_io.machine.profile import Profile

GB = 10**9
SHORT = ["--size", "0.0625", "--seconds", "0.05"]


def written(*gb_per_s):
    """Windows of a second at these rates."""
    return [measure.Figure(0, int(rate * GB), 1.0, 0.1) for rate in gb_per_s]


# ---------------------------------------------------------------------------------------------- deciding


def test_the_knee_is_where_the_rate_falls_for_good():
    assert bench.knee_of([5.0] * 20 + [1.5] * 12) == 20
    assert bench.knee_of([5.1, 4.8] * 10 + [1.4, 1.6] * 6) == 20


def test_noise_and_single_outliers_are_no_knee():
    assert bench.knee_of([5.0] * 30) is None
    assert bench.knee_of([5.0, 4.2, 5.3, 4.6] * 8) is None
    assert bench.knee_of([5.0] * 10 + [0.5] + [5.0] * 10) is None
    assert bench.knee_of([5.0] * 10 + [1.0] * 3) is None, "too few windows to say"
    assert bench.knee_of([]) is None


def test_a_rate_is_steady_when_its_last_windows_are_alike():
    assert bench.is_steady([9.0, 1.5, 1.5, 1.5, 1.5, 1.6, 1.5, 1.5, 1.6])
    assert not bench.is_steady([5.0, 5.0, 5.0, 5.0, 1.5, 1.5, 1.5, 1.5])
    assert not bench.is_steady([1.5] * 3)


def test_sustained_says_rates_before_and_after_and_the_bytes_between():
    found = bench.sustained_of(written(*[5.0] * 20, *[1.5] * 12), "steady")
    assert (found.before_gb_per_s, found.after_gb_per_s, found.knee_bytes) == (5.0, 1.5, 100 * GB)
    assert (found.nbytes, found.seconds) == (118 * GB, 32.0)
    assert bench.sustained_text(found).startswith(
        "5.00 GB/s, then 1.50 GB/s after 100.0 GB (118.0 GB in 32 s"
    )
    flat = bench.sustained_of(written(*[5.0] * 20), "size")
    assert (flat.before_gb_per_s, flat.after_gb_per_s, flat.knee_bytes) == (5.0, 5.0, None)
    assert "throughout" in bench.sustained_text(flat)


def test_percentiles():
    assert bench.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert bench.percentile(range(1, 101), 0.99) == 99
    assert bench.percentile([7.0], 0.99) == 7.0


def test_rates_of_windows():
    rate = bench.rate_of(written(1.0, 3.0, 2.0))
    assert (rate.gb_per_s, rate.least, rate.most, rate.nbytes) == (2.0, 1.0, 3.0, 6 * GB)
    assert rate.cpu_s_per_gb == pytest.approx(0.05)


def test_the_size_of_the_file():
    assert bench.required_bytes(bench.Options(nbytes=GB), 10 * GB) == GB
    assert bench.required_bytes(bench.Options(nbytes=GB, sustained=True), 10 * GB) == 5 * GB
    assert bench.required_bytes(bench.Options(nbytes=GB, sustained=True), 10**13) == 256 * GB
    assert bench.required_bytes(bench.Options(nbytes=GB, sustained=True, sustained_bytes=3 * GB), 0) == 3 * GB
    with pytest.raises(ConfigError, match="at least 48 MiB"):
        bench.required_bytes(bench.Options(nbytes=5), GB)


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path):
    nfs = drive.Mount("0:1", "/", "/mnt", "nfs4", "server:/x", ())
    with pytest.raises(UnsupportedError, match=r"network or shared file system \(nfs4 at /mnt\)"):
        bench.check_place(tmp_path, nfs, GB, 10 * GB)
    with pytest.raises(NoSpaceError, match=r"takes 2.0 GB .* has 1.0 GB free. Nothing was written"):
        bench.check_place(tmp_path, None, 2 * GB, GB)
    with pytest.raises(ConfigError, match="is no folder"):
        bench.check_place(tmp_path / "not there", None, GB, 10 * GB)


# ----------------------------------------------------------------------------------------------- measuring


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="megatrain-io")


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A short measurement, sustained writing included: the profile's file and what was printed."""
    folder = tmp_path_factory.mktemp("drive")
    output = tmp_path_factory.mktemp("out") / "deep" / "profile.json"
    limits = ["--sustained", "--sustained-size", "0.0625", "--io-backend", "threads"]
    result = call("bench", folder, "--output", output, "--json", *SHORT, *limits)
    assert result.exit_code == 0, result.output
    assert entries(folder) == []
    return output, json.loads(result.stdout)


def test_a_measurement_has_every_figure(measured):
    output, printed = measured
    assert printed["profile"] == str(output)
    (found,) = printed["drives"]
    assert found["engine"] == "threads"
    assert all(found[kind]["nbytes"] > 0 for kind in ("read", "write", "mixed"))
    assert found["flush"]["count"] > 0
    assert found["sustained"]["nbytes"] == 64 << 20
    assert printed["cpu"]["adamw_split"] > 0
    assert printed["matmul"]["fp32"] > 0


def test_the_profile_goes_to_a_file_and_comes_back(measured, tmp_path):
    output, printed = measured
    profile = Profile.read(output)
    assert {"profile": str(output), **profile.model_dump(mode="json")} == printed
    profile.write(tmp_path / "copy.json")
    assert Profile.read(tmp_path / "copy.json") == profile
    assert entries(tmp_path) == ["copy.json"]
    text = bench.render(profile)
    assert "memory copy" in text
    assert "registered" not in text
    limited = profile.drives[0].model_copy(
        update={"registration_refused": "RLIMIT_MEMLOCK", "is_direct": False}
    )
    text = bench.render(profile.model_copy(update={"drives": [limited]}))
    assert "no direct I/O here, memory is not registered, which costs CPU time: RLIMIT_MEMLOCK" in text


def test_a_profile_keeps_other_drives_and_forgets_other_machines(measured):
    profile = Profile.read(measured[0])
    (first,) = profile.drives
    other = first.model_copy(update={"mount_point": "/other"})
    newer = first.model_copy(update={"is_direct": not first.is_direct})
    older = profile.model_copy(update={"drives": [first, other]})
    joined = profile.model_copy(update={"drives": [newer]}).joined_to(older)
    assert joined.drives == [other, newer]
    assert joined.drive(first.mount_point, first.source) == newer
    assert joined.drive("/nowhere", "x") is None
    elsewhere = older.model_copy(update={"machine": profile.machine.model_copy(update={"host": "elsewhere"})})
    assert profile.joined_to(elsewhere) == profile
    assert profile.joined_to(None) == profile


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 2}'])
def test_what_is_no_profile_is_refused_before_anything_is_measured(text, tmp_path):
    output = tmp_path / "profile.json"
    output.write_text(text)
    result = call("bench", tmp_path, "--output", output)
    assert result.exit_code == ConfigError.exit_code
    assert "is no profile that this version reads" in result.stderr
    assert output.read_text() == text
    assert entries(tmp_path) == ["profile.json"]


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan"), None, "fast"])
def test_a_profile_with_a_rate_that_none_has_is_refused(rate, measured, tmp_path):
    """Infinite pace of AdamW ended in a traceback of the plan."""
    profile, path = json.loads(measured[0].read_text()), tmp_path / "profile.json"
    profile["cpu"]["adamw_split"] = rate
    path.write_text(json.dumps(profile))
    with pytest.raises(ConfigError, match=r"is no profile that this version reads .* megatrain-io bench"):
        Profile.read(path)


def test_a_profile_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "profile.json", tmp_path):
        result = call("bench", tmp_path, "--output", output)
        assert result.exit_code == StorageError.exit_code
        assert "cannot be" in result.stderr


def test_the_doctor_shows_the_profile_of_this_machine_alone(measured, tmp_path):
    profile = Profile.read(measured[0])
    (drive_,) = profile.drives
    shown = doctor.examine(Path(drive_.mount_point), measured[0])["measured"]
    assert shown["drive"]["read"] == drive_.read.model_dump()
    machine = profile.machine.model_copy(update={"host": "elsewhere"})
    profile.model_copy(update={"machine": machine}).write(tmp_path / "p.json")
    text = doctor.render(doctor.examine(Path(drive_.mount_point), tmp_path / "p.json"))
    assert "is of another machine (elsewhere)" in text


def test_no_profile_is_none(tmp_path):
    assert Profile.read(tmp_path / "none.json") is None


def test_too_little_space_is_one_sentence_and_an_object(tmp_path):
    result = call("bench", tmp_path, "--output", tmp_path / "p.json", "--json", "--size", "1e9")
    assert result.exit_code == NoSpaceError.exit_code
    assert json.loads(result.stdout)["error"]["kind"] == "NoSpaceError"
    assert entries(tmp_path) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    # A background job ignores Ctrl-C, and so would what it starts.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from megatrain_io.machine import bench; real = bench.transfer\n"
        "def transfer(*args, **kwargs):\n"
        "    print('under way', file=sys.stderr, flush=True); return real(*args, **kwargs)\n"
        "bench.transfer = transfer\n"
        "from megatrain_io.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, "bench", tmp_path, "--output", tmp_path / "p.json"]
    options = ["--size", "0.0625", "--seconds", "30", "--no-matmul"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "under way\n"
        assert any("scratch" in path for path in opened_by(process.pid))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted by SIGINT. Nothing was left behind." in said
    assert entries(tmp_path) == []


def opened_by(pid):
    """Paths of the files that a process has open; a descriptor may be gone before it is looked at."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(descriptor.readlink()))
    return found


# ------------------------------------------------------------------------------------------- the small door


def test_transfers_are_counted_and_read_back(tmp_path):
    with measure.scratch_file(tmp_path, 48 << 20, "threads") as file:
        file.fill()
        for traffic, nbytes, read in (
            ("read", 8, 8),
            ("write", 8, 0),
            ("mixed", 26, 14),
            ("training", 52, 28),
        ):
            found = measure.transfer(file, traffic, (1 << 20, 4), nbytes << 20)
            assert (found.read >> 20, found.written >> 20) == (read, nbytes - read)
        file.verify()
        assert entries(tmp_path) == []
    with pytest.raises(MegatrainIoError, match="was closed"):
        file.verify()


@pytest.mark.parametrize("bad", [("dance", (1 << 20, 1)), ("read", (5, 1)), ("read", (1 << 20, 0))])
def test_transfers_that_make_no_sense_are_refused(bad, tmp_path):
    with (
        measure.scratch_file(tmp_path, 1 << 20, "threads") as file,
        pytest.raises((ValueError, MegatrainIoError)),
    ):
        measure.transfer(file, *bad, 1)


def test_one_step_has_the_bits_of_torch():
    import torch

    generator = torch.Generator().manual_seed(5)
    weight, gradient, exp_avg = (torch.randn(1003, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(1003, generator=generator)
    planes = [plane.numpy().tobytes() for plane in (weight, gradient, exp_avg, exp_avg_sq)]
    ours = measure.adamw_step(*planes[:2], (planes[2], planes[3]), (1e-3, 0.9, 0.999, 1e-8, 7), 0.01)
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.01, fused=True)
    parameter.grad = gradient
    state = {"step": torch.tensor(6.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.state[parameter] = state
    optimizer.step()
    theirs = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
    assert ours == [plane.numpy().tobytes() for plane in theirs]
