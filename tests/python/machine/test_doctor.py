"""The doctor: parsers on texts of machines that are not here, and one examination of the one that is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatrain_io.errors import StorageError, UnsupportedError
from megatrain_io.machine import cpu, doctor, drive, memory

MOUNTINFO = r"""
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
23 22 0:21 / /proc rw - proc proc rw
30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate
40 22 0:45 / /mnt/c rw - 9p C:\134 rw,dirsync,aname=drvfs
41 22 0:46 / /mnt/with\040space rw - nfs4 server:/x rw
42 22 0:47 / /home rw - tmpfs tmpfs rw
43 22 259:3 /sub /home rw - btrfs /dev/nvme0n1p3 rw
this line is broken
"""
MOUNTS = drive.parse_mountinfo(MOUNTINFO)
GIB = 2**30


def limit_of(files, cgroup, mounts):
    """The limit found on a machine with these files."""
    folders = memory.cgroup_folders(cgroup, drive.parse_mountinfo(mounts))
    return memory.cgroup_limit(folders, lambda path: files.get(str(path)))


# ---------------------------------------------------------------------------------------------- mounts


@pytest.mark.parametrize(
    ("path", "kind", "source"),
    [
        ("/data/x", "ext4", "/dev/nvme0n1p2"),
        ("/mnt/c/Users", "9p", "C:\\"),
        ("/mnt/cc", "ext4", "/dev/nvme0n1p2"),
        ("/mnt/with space/y", "nfs4", "server:/x"),
        ("/home/ada", "btrfs", "/dev/nvme0n1p3"),  # the later mount hides the tmpfs
    ],
)
def test_the_mount_of_a_path(path, kind, source):
    mount = drive.mount_of(Path(path), MOUNTS)
    assert (mount.kind, mount.source) == (kind, source)


def test_no_mounts_no_mount():
    assert drive.mount_of(Path("/x"), drive.parse_mountinfo("")) is None


def warning_for(kind, point="/x", *, rotational=False, usb=False):
    mount = drive.Mount("0:1", "/", point, kind, "source", ())
    return " ".join(drive.drive_warnings(mount, rotational=rotational, usb=usb))


@pytest.mark.parametrize(
    ("kind", "point", "part"),
    [
        ("9p", "/mnt/c", "Windows drive seen through 9p"),
        ("9p", "/workspace", "network or shared"),
        ("nfs4", "/x", "network or shared"),
        ("cifs", "/x", "network or shared"),
        ("fuse.sshfs", "/x", "network or shared"),
        ("tmpfs", "/x", "that is RAM"),
        ("overlay", "/", "container's own layer"),
        ("fuse.ntfs-3g", "/x", "user space"),
    ],
)
def test_file_systems_that_are_no_place_for_a_store(kind, point, part):
    assert part in warning_for(kind, point)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("tmpfs", "that is RAM, no step survives a power cut"),
        ("ramfs", "that is RAM, no step survives a power cut"),
        ("devtmpfs", "that is RAM, no step survives a power cut"),
        ("overlay", "goes with the container"),
        ("fuse.ntfs-3g", "user space"),
    ],
)
def test_a_doubtful_place_for_a_store_is_told_before_the_import(tmp_path, kind, part):
    """It was silent, or said that 0.0 MiB were free."""
    mounts = [
        drive.Mount("0:1", "/", "/", "ext4", "source", ()),
        drive.Mount("0:2", "/", str(tmp_path), kind, kind, ()),
    ]
    (note,) = drive.store_drive_notes([tmp_path / "new" / "store.mtio", tmp_path], mounts)
    assert part in note
    assert drive.store_drive_notes([tmp_path], mounts[:1]) == []
    assert drive.store_drive_notes([tmp_path], []) == []


@pytest.mark.parametrize("kind", ["proc", "sysfs", "cgroup2", "nfs4", "cifs", "fuse.sshfs", "virtiofs"])
def test_a_place_that_keeps_no_files_of_ours_is_refused(tmp_path, kind):
    mounts = [drive.Mount("0:2", "/", str(tmp_path), kind, kind, ())]
    with pytest.raises(UnsupportedError, match=rf"store would lie on {tmp_path}.*{kind}.*a local drive"):
        drive.store_drive_notes([tmp_path / "store"], mounts)


def test_a_place_that_is_mounted_read_only_is_refused(tmp_path, monkeypatch):
    mounts = [drive.Mount("0:2", "/", str(tmp_path), "ext4", "/dev/x", ())]
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(StorageError, match=r"mounted read-only\. Mount it for writing"):
        drive.store_drive_notes([tmp_path / "store"], mounts)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs"])
def test_local_file_systems_are_fine(kind):
    assert warning_for(kind) == ""


def test_slow_drives_are_named():
    assert "spinning disk" in warning_for("ext4", rotational=True)
    assert "USB" in warning_for("ext4", usb=True)


def test_what_virtual_drives_say_of_themselves_means_nothing():
    hard_disk = Path("/sys/devices/pci0000:00/ata1/block/sda")
    assert drive.spins("1\n", hard_disk, "WDC WD40EFRX") is True
    assert drive.spins("0\n", hard_disk, None) is False
    assert drive.spins(None, hard_disk, None) is None
    assert drive.spins("1\n", hard_disk, "Virtual Disk    \n") is None
    assert drive.spins("1\n", Path("/sys/devices/pci0000:00/virtio1/block/vda"), None) is None


def test_the_queue_of_a_drive():
    files = {
        "scheduler": "[none] mq-deadline\n",
        "write_cache": "write back\n",
        "logical_block_size": "512\n",
        "dma_alignment": "3\n",
        "max_sectors_kb": "1280\n",
    }
    queue = drive.parse_queue(files.get)
    assert queue == {
        "scheduler": "none",
        "write_cache": "write back",
        "logical_block_size": 512,
        "dma_alignment": 4,
        "largest_request_kib": 1280,
    }
    about = {"path": "/x", "free": 1, "total": 2, "file_system": "ext4", "source": "/dev/nvme0n1p2"}
    about |= {"model": None, "rotational": False, "direct_io": True, "queue": queue, "dio_alignment": None}
    assert drive.drive_texts(about)[1] == (
        "direct I/O, logical blocks of 512 bytes, memory aligned to 4, requests up to 1280 KiB, "
        "write cache: write back, scheduler none"
    )
    assert drive.drive_texts({**about, "direct_io": None, "queue": None})[1:] == []
    aligned = {**about, "queue": None, "dio_alignment": {"memory": 4, "offset": 512}}
    assert drive.drive_texts(aligned)[1] == "direct I/O aligned to 512 bytes in the file and 4 in memory"
    buffered = {**aligned, "dio_alignment": {"memory": 0, "offset": 0}}
    assert "page cache" in drive.drive_texts(buffered)[1], "what was opened is not what it does"
    assert "page cache" in drive.drive_texts({**about, "direct_io": False, "queue": None})[1]


def test_a_drive_without_a_queue_says_nothing_wrong():
    assert set(drive.parse_queue({}.get).values()) == {None}
    assert drive.parse_queue({"scheduler": "none\n"}.get)["scheduler"] == "none"


def test_direct_io_is_tried_and_leaves_nothing(tmp_path):
    assert drive.direct_io(tmp_path) in {True, False, None}
    assert drive.direct_io(tmp_path / "not there") is None
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- cgroups


def test_cgroup_v2_limit_of_a_parent_counts_and_page_cache_does_not():
    base = "/sys/fs/cgroup"
    files = {
        f"{base}/user.slice/run.scope/memory.max": "max\n",
        f"{base}/user.slice/run.scope/memory.current": "1\n",
        f"{base}/user.slice/memory.max": f"{8 * GIB}\n",
        f"{base}/user.slice/memory.high": "max\n",
        f"{base}/user.slice/memory.current": f"{5 * GIB}\n",
        f"{base}/user.slice/memory.stat": f"anon 7\ninactive_file {3 * GIB}\nactive_file 1\n",
    }
    found = limit_of(files, "0::/user.slice/run.scope\n", MOUNTINFO)
    assert found == memory.CgroupLimit(2, f"{base}/user.slice/memory.max", 8 * GIB, 2 * GIB)


def test_cgroup_v2_high_is_a_limit_too():
    files = {"/sys/fs/cgroup/memory.max": f"{8 * GIB}", "/sys/fs/cgroup/memory.high": f"{6 * GIB}"}
    assert limit_of(files, "0::/\n", MOUNTINFO).limit == 6 * GIB


V1_MOUNTS = """
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
"""


def test_cgroup_v1_in_a_container_that_sees_the_paths_of_the_host():
    files = {
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{16 * GIB}\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
    }
    cgroup = "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    found = limit_of(files, cgroup, V1_MOUNTS)
    assert found == memory.CgroupLimit(1, "/sys/fs/cgroup/memory/memory.limit_in_bytes", 16 * GIB, 3 * GIB)
    assert limit_of(files, "4:memory:/elsewhere\n", V1_MOUNTS) == found


def test_no_limit_is_no_limit():
    files = {"/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert limit_of(files, "4:memory:/docker/abc\n", V1_MOUNTS) is None
    assert limit_of({}, "0::/x\n", MOUNTINFO) is None
    assert limit_of({}, "", "") is None
    assert limit_of({"/sys/fs/cgroup/memory.max": "?"}, "0::/\n", MOUNTINFO) is None


def test_the_memory_that_counts():
    tight = memory.CgroupLimit(2, "/sys/fs/cgroup/memory.max", 16 * GIB, GIB)
    found = memory.memory_that_counts(64 * GIB, 60 * GIB, tight)
    assert (found["usable"], found["usable_because"]) == (15 * GIB, "the cgroup limit")
    found = memory.memory_that_counts(64 * GIB, 10 * GIB, tight)
    assert (found["usable"], found["usable_because"]) == (10 * GIB, "the host's available memory")
    assert memory.memory_that_counts(64 * GIB, 10 * GIB, None)["cgroup"] is None
    over = memory.CgroupLimit(2, "f", GIB, 2 * GIB)
    assert memory.memory_that_counts(64 * GIB, 10 * GIB, over)["usable"] == 0


# ------------------------------------------------------------------------------------ small parsers


def test_processors():
    intel = (
        "processor : 0\nmodel name\t: Some CPU @ 3GHz\nflags\t\t: fpu avx2 fma avx512f zzz\n\nprocessor : 1\n"
    )
    assert cpu.parse_cpuinfo(intel) == ("Some CPU @ 3GHz", ["avx2", "fma", "avx512f"])
    assert cpu.parse_cpuinfo("Features\t: fp asimd bf16\n") == (None, ["asimd", "bf16"])
    assert cpu.parse_cpuinfo("") == (None, [])


def test_choices():
    assert drive.parse_choice("always [madvise] never\n") == "madvise"
    assert drive.parse_choice("none [mq-deadline] kyber\n") == "mq-deadline"
    assert drive.parse_choice(None) is None


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", "WSL2"),
        ("4.4.0-19041-Microsoft", "WSL1"),
        ("6.8.0-45-generic", None),
    ],
)
def test_wsl(release, expected):
    assert doctor.wsl_of(release) == expected


def test_containers():
    assert doctor.container_of({"/.dockerenv"}, "") == "docker"
    assert doctor.container_of({"/run/.containerenv"}, "") == "podman"
    assert doctor.container_of(set(), "1:cpu:/kubepods/burstable/pod1\n") == "kubepods"
    assert doctor.container_of(set(), "0::/init.scope\n") is None


# ------------------------------------------------------------------------------- the examination itself


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x")
    return doctor.examine(folder / "not" / "there", folder / "profile.json")


def test_this_machine(found):
    assert json.loads(json.dumps(found)) == found
    assert found["memory"]["usable"] > 0
    assert found["drive"]["free"] > 0
    assert found["megatrain_io"]["adamw_kernels"][0] == "scalar"
    text = doctor.render(found)
    assert text.startswith("megatrain-io ")
    assert "io_uring" in text
    assert "None" not in text.replace("none that", "")


def test_what_is_missing_is_said(found):
    bad = {
        **found,
        "megatrain_io": {"version": None, "broken": "ImportError: no libstdc++"},
        "gpus": {"devices": [], "reason": "the driver is too old"},
        "drive": {"path": "/x", "free": 1, "total": 2, "file_system": None, "warnings": ["/x is bad"]},
        "uring": {"available": False, "reason": "EPERM"},
        "locked_memory_limit": None,
        "transparent_huge_pages": None,
        "memory": memory.memory_that_counts(
            64 * GIB, 60 * GIB, memory.CgroupLimit(2, "/a/memory.max", 16 * GIB, 0)
        ),
    }
    text = doctor.render(bad)
    for part in [
        "the extension cannot be used: ImportError: no libstdc++",
        "none that torch can use: the driver is too old",
        "not available: EPERM",
        "unlimited",
        "warning: /x is bad",
        "warning: this container allows 16.0 GiB (cgroup memory.max) although the host has 64.0 GiB",
    ]:
        assert part in text


def test_a_gpu_and_a_debug_build(found):
    gpu = {"name": "H200", "capability": "9.0", "total": 140 * GIB, "free": 139 * GIB}
    package = {**found["megatrain_io"], "profile": "debug"}
    text = doctor.render({**found, "gpus": {"devices": [gpu], "reason": None}, "megatrain_io": package})
    assert "H200, 139.0 GiB free of 140.0 GiB, compute capability 9.0" in text
    assert "warning: this is a debug build" in text


def test_the_figures_of_the_last_bench(found, tmp_path):
    assert "not yet on this drive: megatrain-io bench" in doctor.render(found)
    (tmp_path / "profile.json").write_text("{}")
    broken = doctor.examine(tmp_path, tmp_path / "profile.json")
    assert "is no profile that this version reads" in doctor.render(broken)
    figures = {
        **{kind: {"gb_per_s": rate} for kind, rate in (("read", 2.5), ("write", 5.0), ("mixed", 3.0))},
        "flush": {"sync_median": 0.0015},
        "engine": "uring",
        "measured_at": "2026-11-23T09:00:00Z",
    }
    text = doctor.render({**found, "measured": {"drive": figures, "reason": None}})
    assert (
        "read 2.50, write 5.00, mixed 3.00 GB/s, fdatasync 1.50 ms (engine uring, 2026-11-23T09:00:00Z)"
        in text
    )


def test_the_peak_of_a_process_is_its_own_not_that_of_who_started_it():
    held = bytearray(GIB)
    program = (
        "import resource; from megatrain_io.machine.memory import peak_ram; "
        "print(peak_ram(), resource.getrusage(0).ru_maxrss * 1024)"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    its_own, inherited = (int(word) for word in child.stdout.split())
    assert memory.peak_ram() > len(held)
    assert inherited > len(held)  # what getrusage says of the child
    assert its_own < GIB // 4
