"""What `make wheel` built is what it says: platform tag, stable ABI, contents of both archives.

    python tests/wheel/audit.py dist

Needs the packages of the dependency group `wheel`. Ends with 1 when something is wrong, with a line for each thing.
"""

import json
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

GLIBC = (2, 28)
TAG = f"cp311-abi3-manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
WHEEL_NEEDS = {"megatrain_io/_lib.abi3.so", "megatrain_io/_lib.pyi", "megatrain_io/py.typed"}
SDIST_NEEDS = {
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "clippy.toml",
    "pyproject.toml",
}
SDIST_FOLDERS = {"benches", "docs", "python", "rust"}
SDIST_NBYTES_MAX = 2 << 20  # text alone: what is larger was taken in by mistake


def glibc_of(name: str) -> tuple[int, int] | None:
    """The glibc that a manylinux tag or a symbol's version asks for; None for any other."""
    match = re.match(r"(?:manylinux|GLIBC)_(\d+)[_.](\d+)", name)
    return (int(match[1]), int(match[2])) if match else None


def problems_of_platform(wheel: Path) -> list[str]:
    """By auditwheel, which reads the versions of the symbols that the extension takes from glibc."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    versions = {glibc for names in report["versioned_symbols"].values() for glibc in map(glibc_of, names)}
    newest = max(filter(None, versions))
    print(f"auditwheel: {report['overall_tag']}; the newest symbol is of glibc {newest[0]}.{newest[1]}")
    problems = []
    glibc = glibc_of(report["overall_tag"])
    if glibc is None or glibc > GLIBC:
        problems.append(f"auditwheel finds {report['overall_tag']}; {TAG} was to be built")
    if report["external_libs"]:
        problems.append(f"it needs libraries that a system may lack: {', '.join(report['external_libs'])}")
    if not wheel.name.endswith(f"-{TAG}.whl"):
        problems.append(f"{wheel.name} is not tagged {TAG}")
    return problems


def problems_of_abi(wheel: Path) -> list[str]:
    """By abi3audit: every symbol taken from Python is in the stable ABI of 3.11."""
    command = [sys.executable, "-m", "abi3audit", "--strict", "--summary", str(wheel)]
    audit = subprocess.run(command, check=False, capture_output=True, text=True)
    text = " ".join((audit.stdout + audit.stderr).split())
    print(f"abi3audit: {text.partition('.whl: ')[2] or text}")
    return [] if audit.returncode == 0 else ["abi3audit finds symbols outside the stable ABI"]


def problems_of_contents(wheel: Path, sdist: Path) -> list[str]:
    """Nothing is missing, and nothing is in them that belongs to the checkout alone."""
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        source = {PurePosixPath(*PurePosixPath(name).parts[1:]) for name in archive.getnames()}
    modules = {str(path.relative_to("python")) for path in source if path.parts[0] == "python"}
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(installed)} files")
    print(f"{sdist.name}: {sdist.stat().st_size:,} bytes, {len(source)} files")
    names = {str(path) for path in source}
    foreign = {
        name
        for name in installed
        if not re.match(r"megatrain_io(-[^/]+\.dist-info)?/", name) or name.endswith(".pyc")
    }
    outside = {path.parts[0] for path in source if len(path.parts) > 1} - SDIST_FOLDERS
    compiled = {name for name in names if name.endswith((".so", ".pyc", ".rlib"))}
    found = {
        "missing in the wheel": (WHEEL_NEEDS | modules) - installed,
        "too much in the wheel": foreign,
        "missing in the sdist": SDIST_NEEDS - names,
        "folders missing in the sdist": SDIST_FOLDERS - {path.parts[0] for path in source},
        "folders too many in the sdist": outside,
        "compiled files in the sdist": compiled,
    }
    problems = [f"{what}: {', '.join(sorted(those))}" for what, those in found.items() if those]
    if sdist.stat().st_size > SDIST_NBYTES_MAX:
        problems.append(f"the sdist has {sdist.stat().st_size:,} bytes; {SDIST_NBYTES_MAX:,} are allowed")
    return problems


def main(folder: Path) -> int:
    """Audit the one wheel and the one sdist in a folder; the exit status."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    problems = problems_of_platform(wheel) + problems_of_abi(wheel) + problems_of_contents(wheel, sdist)
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
