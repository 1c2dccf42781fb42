"""Bytes to and from a drive, side by side: fio, DeepNVMe, the usual ways of Python, and megatrain-io.

    python benches/compare_io.py --rounds 5 --mib 1024 --folder /nvme

Each bar is a process of its own, started anew in each round (whether large buffers come to lie well is drawn once a
process), and the bars take turns. Only the transfers are timed, not starts and checks; what was read is compared
once a round. CPU seconds are those of the process; the kernel's own threads, which write the page cache back, are
nobody's. fio asks for the CPU time of its one thread (RUSAGE_THREAD): the workers of io_uring, which take large
requests over when the drive's queue is full, are missing from its figure, which is a lower bound therefore. What goes
through the page cache is timed with its fsync.

``mixed`` is 14 bytes read for 12 written. A bar named ``extents`` moves 4 and 20 MiB, as training does.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from comparison import MIB, SkippedError, answer, child, in_turn, machine, machine_text, shown, tell

KINDS = ("read", "write", "mixed")
# A drive's rate wanders from second to second: what is timed goes over the same bytes so often.
PASSES = 3
FORMS = {"1M qd32": (1 * MIB, 32), "4M qd8": (4 * MIB, 8), "8M qd4": (8 * MIB, 4)}
DEPTHS_OF_EXTENTS = (4, 8)
WEIGHT, UPDATE = 4 * MIB, 20 * MIB
# The allocator of fio's buffers asks for huge pages: without them it is half as fast, and no ceiling.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

Figures = dict[str, dict[str, float]]


class Clock:
    """Wall and CPU time of what stands inside the ``with``."""

    def __enter__(self) -> Self:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    def figure(self, read: int, written: int) -> dict[str, float]:
        """With the bytes that were moved."""
        return {"read": read, "written": written, "seconds": self.wall, "cpu_seconds": self.cpu}


def drop_caches(path: Path) -> None:
    """Before a read through the page cache; without root the file's own pages alone."""
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


# ------------------------------------------------------------------------------------------------- fio


def fio(folder: Path, nbytes: int, kind: str, form: str, *, registered: bool = True) -> dict[str, float]:
    """One run over a file that was written before."""
    path = folder / "fio.dat"
    command = [
        "fio",
        "--name=bar",
        f"--filename={path}",
        "--ioengine=io_uring",
        "--direct=1",
        f"--size={nbytes}",
        f"--loops={PASSES}",
    ]
    command += ["--output-format=json", "--randrepeat=0", "--fallocate=none", "--scramble_buffers=0"]
    command += ["--fixedbufs=1", "--registerfiles=1"] if registered else []
    if form.startswith("extents"):
        # 3 reads to 2 writes, by number: 4 + 4 + 20 MiB read for 4 + 20 MiB written.
        command += [
            "--bssplit=4m/67:20m/33,4m/50:20m/50",
            "--rwmixread=60",
            f"--iodepth={form.split('qd')[1]}",
        ]
    else:
        command += [f"--bs={FORMS[form][0]}", f"--iodepth={FORMS[form][1]}", "--rwmixread=54"]
    command.append(f"--rw={'rw' if kind == 'mixed' else kind}")
    done = subprocess.run(
        command, env={**os.environ, **HUGE_PAGES}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    moved = {"read": job["read"]["io_bytes"], "written": job["write"]["io_bytes"]}
    return {**moved, "seconds": seconds, "cpu_seconds": cpu}


def fio_version() -> str | None:
    """As fio says it, or None where there is none."""
    program = shutil.which("fio")
    if program is None:
        return None
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def lay_out(path: Path, nbytes: int) -> None:
    """A file whose every extent was written, with bytes that do not repeat."""
    with path.open("wb") as file:
        for _ in range(nbytes // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------- ours: the engines, the store


def engine(folder: Path, nbytes: int, name: str, form: str) -> Figures:
    """Transfers by the package's own engine, without checksums, as fio makes them."""
    from megatrain_io.errors import UnsupportedError
    from megatrain_io.measure import scratch_file, transfer

    found: Figures = {}
    try:
        with scratch_file(folder, max(nbytes, 128 * MIB), name) as file:
            file.fill()
            if form.startswith("extents"):
                runs = {"mixed": ("training", (UPDATE, int(form.split("qd")[1])))}
            else:
                runs = {kind: (kind, FORMS[form]) for kind in ("write", "read", "mixed")}
            for kind, (traffic, shape) in runs.items():
                found[kind] = vars(transfer(file, traffic, shape, PASSES * nbytes))
            file.verify()
    except UnsupportedError as error:
        raise SkippedError(str(error)) from error
    return found


def tensor_store(folder: Path, nbytes: int, engine_name: str) -> Figures:
    """Tensors of 4 and 20 MiB through ``megatrain_io.TensorStore``, checksums included, without commits."""
    try:
        from megatrain_io import TensorStore
        from megatrain_io.errors import UnsupportedError
    except ImportError as error:
        raise SkippedError("this version of megatrain-io has no TensorStore") from error
    import torch

    chunks = max(8, nbytes // (WEIGHT + UPDATE))  # with fewer, a tensor in flight would be written again
    sizes = {f"{kind}{i}": size for i in range(chunks) for kind, size in (("w", WEIGHT), ("u", UPDATE))}
    shapes = {name: ((size // 4,), torch.int32) for name, size in sizes.items()}
    total = sum(sizes.values())
    path, memory = folder / "tensors.mtio", total + 512 * MIB
    try:
        store = TensorStore.create(path, shapes, durability="scratch", engine=engine_name, memory=memory)
    except UnsupportedError as error:
        raise SkippedError(str(error)) from error
    found: Figures = {}
    with store:
        tensors = {name: store.empty(name) for name in sizes}
        for tensor in tensors.values():
            tensor.random_(-(2**31), 2**31)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        settle(
            [store.put(name, tensor) for name, tensor in tensors.items()]
        )  # each extent is written once untimed
        with Clock() as clock:
            for _ in range(PASSES):
                settle([store.put(name, tensor) for name, tensor in tensors.items()])
        found["write"] = clock.figure(0, PASSES * total)
        tensor = None
        with Clock() as clock:
            for _ in range(PASSES):
                tensors.clear()  # their memory is what is read into
                tickets = {name: store.prefetch(name) for name in sizes}
                settle(list(tickets.values()))
                tensors.update({name: ticket.result() for name, ticket in tickets.items()})
                tickets.clear()
        found["read"] = clock.figure(PASSES * total, 0)
        if not all(torch.equal(tensors[name], copies[name]) for name in sizes):
            sys.exit("TensorStore read other bytes than it wrote")
        found["mixed"] = mixed_tensors(store, tensors, chunks // 2)
    return found


def mixed_tensors(store: Any, tensors: dict[str, Any], half: int) -> dict[str, float]:
    """Read the first half and write the second, eight in flight: 28 bytes read for 24 written.

    As a step does, the weights are read twice; the second time with the rest, here two chunks later.
    """
    for i in range(half):
        del tensors[f"w{i}"], tensors[f"u{i}"]
    put = lambda name: store.put(name, tensors[name])  # noqa: E731
    with Clock() as clock:
        flying: deque[Any] = deque()
        for i in PASSES * [*range(half)]:
            written, again = half + i, (i - 2) % half
            for ask, name in (
                (store.prefetch, f"w{i}"),
                (put, f"u{written}"),
                (put, f"w{written}"),
                (store.prefetch, f"u{i}"),
                (store.prefetch, f"w{again}"),
            ):
                if len(flying) == max(DEPTHS_OF_EXTENTS):
                    settle([flying.popleft()])
                flying.append(ask(name))
        settle([*flying])
    turns = PASSES * half
    return clock.figure(turns * (2 * WEIGHT + UPDATE), turns * (WEIGHT + UPDATE))


def settle(tickets: list[Any]) -> None:
    """Wait for all of them, and take what was read: what nobody took is not read again by the next prefetch."""
    for ticket in tickets:
        ticket.wait()
        if hasattr(ticket, "result"):
            ticket.result()


def checksum(_folder: Path, nbytes: int) -> Figures:
    """What the store's checksums cost by themselves."""
    from megatrain_io.measure import Workload, figure_of

    workload = Workload("checksum", nbytes // 4)
    workload.run()
    return {"checksum": vars(figure_of(workload.run()))}


# ------------------------------------------------------------------------------------------------ peers


def deepnvme(folder: Path, nbytes: int, block: int, depth: int) -> Figures:
    """``aio_handle`` of DeepSpeed, from its own pinned tensors."""
    try:
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder

        with contextmanager(_quiet)():
            handle = AsyncIOBuilder().load(verbose=False).aio_handle(block, depth, False, True, 1)
    except ImportError as error:
        raise SkippedError(f"deepspeed is not installed ({error})") from error
    except Exception as error:
        raise SkippedError(f"DeepNVMe cannot be built here: {str(error).splitlines()[-1]}") from error
    path = str(folder / "deepnvme.dat")
    size = nbytes // 4
    tensor = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.int32))
    tensor.copy_(torch.randint(-(2**31), 2**31, (size,), dtype=torch.int32))
    copy = tensor.clone()
    found: Figures = {}
    handle.sync_pwrite(tensor, path, 0)  # every extent is written once before anything is timed
    with Clock() as clock:
        for _ in range(PASSES):
            handle.sync_pwrite(tensor, path, 0)
    found["write"] = clock.figure(0, PASSES * nbytes)
    tensor.zero_()
    with Clock() as clock:
        for _ in range(PASSES):
            handle.sync_pread(tensor, path, 0)
    found["read"] = clock.figure(PASSES * nbytes, 0)
    if not torch.equal(tensor, copy):
        sys.exit("DeepNVMe read other bytes than it wrote")
    # Reads from the first half and writes to the second. It can wait for all operations only.
    turns, middle = nbytes // 2 // (WEIGHT + UPDATE), nbytes // 2 // 4096 * 4096
    part = lambda start, count: tensor[start // 4 : (start + count) // 4]  # noqa: E731
    read = written = 0
    with Clock() as clock:
        for turn in PASSES * [*range(turns)]:
            at = turn * (WEIGHT + UPDATE)
            for first, count, is_read in (
                (at, WEIGHT, True),
                (middle + at + WEIGHT, UPDATE, False),
                (middle + at, WEIGHT, False),
                (at + WEIGHT, UPDATE, True),
            ):
                submit = handle.async_pread if is_read else handle.async_pwrite
                submit(part(first, count), path, first)
            handle.async_pread(part(at, WEIGHT), path, at)
            handle.wait()
            read, written = read + 2 * WEIGHT + UPDATE, written + WEIGHT + UPDATE
    found["mixed"] = clock.figure(read, written)
    handle.free_cpu_locked_tensor(tensor)
    return found


def _quiet() -> Iterator[None]:
    """Builds print to standard output, which is for the figures."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def through_the_page_cache(folder: Path, nbytes: int, how: str) -> Figures:
    """safetensors, torch.save, or a numpy memmap: written with fsync, read with cold caches into memory."""
    import torch

    tensor = torch.randint(-(2**31), 2**31, (nbytes // 4,), dtype=torch.int32)
    out = torch.zeros_like(tensor)
    path = folder / "page-cache.dat"
    write, read = WAYS[how]
    write(path, tensor)  # the file's space is allocated before anything is timed, where it is kept
    with Clock() as clock:
        write(path, tensor)
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    found = {"write": clock.figure(0, nbytes)}
    drop_caches(path)
    with Clock() as clock:
        read(path, out)
    found["read"] = clock.figure(nbytes, 0)
    if not torch.equal(out, tensor):
        sys.exit(f"{how} read other bytes than it wrote")
    return found


def _write_safetensors(path: Path, tensor: Any) -> None:
    from safetensors.torch import save_file

    save_file({"x": tensor}, path)


def _read_safetensors(path: Path, out: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        out.copy_(file.get_tensor("x"))


def _write_torch(path: Path, tensor: Any) -> None:
    import torch

    torch.save(tensor, path)


def _read_torch(path: Path, out: Any) -> None:
    import torch

    out.set_(torch.load(path, weights_only=True))


def _write_memmap(path: Path, tensor: Any) -> None:
    import numpy as np

    mode = "r+" if path.exists() else "w+"
    mapped = np.memmap(path, np.int32, mode, shape=tuple(tensor.shape))
    mapped[:] = tensor.numpy()
    mapped.flush()


def _read_memmap(path: Path, out: Any) -> None:
    import numpy as np

    out.numpy()[:] = np.memmap(path, np.int32, "r", shape=tuple(out.shape))


WAYS: dict[str, tuple[Callable[[Path, Any], None], Callable[[Path, Any], None]]] = {
    "safetensors": (_write_safetensors, _read_safetensors),
    "torch.save": (_write_torch, _read_torch),
    "numpy memmap": (_write_memmap, _read_memmap),
}

# ------------------------------------------------------------------------------------------------- bars

EXTENTS = [f"extents qd{depth}" for depth in DEPTHS_OF_EXTENTS]
# name: (group that goals compare, function in a process of its own, its arguments)
BARS: dict[str, tuple[str, Callable[..., Figures] | None, tuple[Any, ...]]] = {
    **{f"fio {form}": ("fio", None, (form, True)) for form in [*FORMS, *EXTENTS]},
    **{
        f"fio {form}, nothing registered": ("fio, nothing registered", None, (form, False))
        for form in ("1M qd32", "8M qd4")
    },
    **{
        f"{name} {form}": (name, engine, (name, form))
        for name in ("uring", "threads")
        for form in [*FORMS, *EXTENTS]
    },
    **{
        f"TensorStore {name}": (f"TensorStore {name}", tensor_store, (name,)) for name in ("uring", "threads")
    },
    "checksums alone": ("checksum", checksum, ()),
    "DeepNVMe 1M qd32": ("DeepNVMe", deepnvme, (MIB, 32)),
    "DeepNVMe 8M qd32": ("DeepNVMe", deepnvme, (8 * MIB, 32)),
    **{how: ("page cache", through_the_page_cache, (how,)) for how in WAYS},
}


def run(name: str, options: argparse.Namespace, folder: Path) -> Figures:
    """One round of one bar."""
    group, work, arguments = BARS[name]
    nbytes = options.mib * MIB
    if work is not None:
        python = options.peer_python if group == "DeepNVMe" else sys.executable
        environment = {"DS_ACCELERATOR": "cpu"} if group == "DeepNVMe" else {}
        # Tools of a build (ninja) lie beside the interpreter.
        environment["PATH"] = f"{Path(python).parent}:{os.environ.get('PATH', '')}"
        return child(__file__, python, [name, str(folder), str(nbytes)], environment)
    if shutil.which("fio") is None:
        raise SkippedError("fio is not installed")
    form, registered = arguments
    kinds = ("mixed",) if form.startswith("extents") else KINDS
    return {kind: fio(folder, nbytes, kind, form, registered=registered) for kind in kinds}


# -------------------------------------------------------------------------------------- tables and goals

Results = dict[str, list[Figures]]


def rates(rounds: list[Figures], kind: str) -> list[float]:
    """GB/s of each round, read and written together."""
    runs = [figures[kind] for figures in rounds if kind in figures]
    return [(run["read"] + run["written"]) / 1e9 / run["seconds"] for run in runs]


def costs(rounds: list[Figures], kind: str) -> list[float]:
    """CPU seconds for each GB of each round."""
    runs = [figures[kind] for figures in rounds if kind in figures]
    return [run["cpu_seconds"] / ((run["read"] + run["written"]) / 1e9) for run in runs]


def best(results: Results, group: str, kind: str) -> str | None:
    """The bar of a group with the highest median."""
    names = [name for name in results if BARS[name][0] == group and rates(results[name], kind)]
    return max(names, key=lambda name: statistics.median(rates(results[name], kind)), default=None)


def table(results: Results, kind: str) -> Iterator[str]:
    """One line a bar."""
    yield f"\n| {kind} | GB/s | of fio's best with registered buffers | CPU s/GB |"
    yield "|---|---|---|---|"
    ceiling = best(results, "fio", kind)
    for name, rounds in results.items():
        if found := rates(rounds, kind):
            share = ""
            if ceiling is not None:
                top = statistics.median(rates(results[ceiling], kind))
                share = f"{100 * statistics.median(found) / top:.0f} %"
            yield f"| {name} | {shown(found)} | {share} | {shown(costs(rounds, kind), 3)} |"


def goals(results: Results) -> list[dict[str, Any]]:
    """Each goal with the figures that decide it; ``met`` is None where a side was not measured."""
    found = []
    for kind in KINDS:
        for group in ("uring", "TensorStore uring"):
            goal = f"{kind}: {group} at least 95 % of fio's best"
            found.append(goal_of(goal, _share(results, group, "fio", kind), 0.95))
            goal = f"{kind}: {group} above DeepNVMe in every round"
            found.append(goal_of(goal, _worst(results, group, kind), 1.0))
            others = group.replace("uring", "threads")
            goal = f"{kind}: {others} at least 90 % of {group}"
            found.append(goal_of(goal, _share(results, others, group, kind), 0.90))
            words = "" if group == "uring" else " + checksums"
            goal = f"{kind}: CPU s/GB of {group} within 1.2 x fio's{words}"
            found.append(goal_of(goal, *cpu_and_bound(results, group, kind), at_least=False))
    return found


def goal_of(goal: str, value: float | None, bound: float, *, at_least: bool = True) -> dict[str, Any]:
    """A goal, what was found and whether that is enough."""
    is_met = None if value is None else (value >= bound if at_least else value <= bound)
    return {"goal": goal, "value": value, "bound": bound, "met": is_met}


def _share(results: Results, of: str, to: str, kind: str) -> float | None:
    """Ratio of the medians of two groups' fastest bars."""
    ours, theirs = best(results, of, kind), best(results, to, kind)
    if ours is None or theirs is None:
        return None
    return statistics.median(rates(results[ours], kind)) / statistics.median(rates(results[theirs], kind))


def cpu_and_bound(results: Results, group: str, kind: str) -> tuple[float | None, float]:
    """CPU seconds a GB of a group's fastest bar, and what fio allows it; checksums where it takes them.

    The same requests where fio had them too (half as many in flight cost more CPU); else its fastest bar.
    """
    ours, theirs = best(results, group, kind), best(results, "fio", kind)
    if ours is not None and (alike := ours.replace(group, "fio", 1)) in results:
        theirs = alike
    bound = 0.0 if theirs is None else 1.2 * statistics.median(costs(results[theirs], kind))
    sums = costs(results.get("checksums alone", []), "checksum")
    takes_sums = group.startswith("TensorStore")
    if takes_sums and sums:
        bound += statistics.median(sums)
    if ours is None or theirs is None or (takes_sums and not sums):
        return None, bound
    return statistics.median(costs(results[ours], kind)), bound


def _worst(results: Results, group: str, kind: str) -> float | None:
    """The least ratio to the fastest DeepNVMe bar of the same round."""
    ours = best(results, group, kind)
    theirs = [rates(r, kind) for name, r in results.items() if BARS[name][0] == "DeepNVMe"]
    theirs = [each for each in theirs if each]
    if ours is None or not theirs:
        return None
    return min(
        rate / max(others)
        for rate, others in zip(rates(results[ours], kind), zip(*theirs, strict=True), strict=True)
    )


def report(
    options: argparse.Namespace,
    facts: dict[str, Any],
    results: Results,
    reached: list[dict[str, Any]],
    skipped: dict[str, str],
) -> None:
    """The machine, a table for each kind, the goals, and what was skipped and why."""
    print(
        f"{machine_text(facts)}\n{options.mib} MiB a transfer, {options.rounds} rounds; medians (least to most)"
    )
    for kind in (*KINDS, "checksum"):
        lines = list(table(results, kind))
        if len(lines) > 2:
            print("\n".join(lines))
    print("\n| goal | bound | found | |\n|---|---|---|---|")
    for each in reached:
        value = "not measured" if each["value"] is None else f"{each['value']:.3f}"
        verdict = {True: "pass", False: "FAIL", None: ""}[each["met"]]
        print(f"| {each['goal']} | {each['bound']:.3f} | {value} | {verdict} |")
    for name, reason in skipped.items():
        print(f"\n{name} was skipped: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="of each transfer; a multiple of 48 is best")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the drive to measure")
    parser.add_argument(
        "--only", default="", help="bars whose names hold one of these words: fio,uring,DeepNVMe"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of every round")
    options = parser.parse_args()
    words = [word.strip() for word in options.only.split(",") if word.strip()]
    names = [name for name in BARS if not words or any(word in name for word in words)]
    facts = machine(options.folder, options.peer_python)
    facts["versions"]["fio"] = fio_version()
    if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        tell("the page cache is dropped file by file only, as this is not root")
    results: Results = {name: [] for name in names}
    skipped: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="compare-io-"))
    try:
        if any(BARS[name][0] == "fio" for name in names):
            lay_out(folder / "fio.dat", options.mib * MIB)
        for number, name in in_turn(names, options.rounds):
            if name in skipped:
                continue
            tell(f"round {number + 1} of {options.rounds}: {name}")
            try:
                results[name].append(run(name, options, folder))
            except SkippedError as reason:
                skipped[name] = str(reason)
                tell(f"{name} is skipped: {reason}")
            for path in folder.iterdir():
                if path.name != "fio.dat":
                    path.unlink()
    finally:
        shutil.rmtree(folder)
    results = {name: rounds for name, rounds in results.items() if rounds}
    reached = goals(results)
    report(options, facts, results, reached, skipped)
    if options.json is not None:
        plain = {"rounds": options.rounds, "mib": options.mib, "only": words}
        everything = {
            "machine": facts,
            "options": plain,
            "results": results,
            "skipped": skipped,
            "goals": reached,
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        bar, place, size = sys.argv[2:]
        answer(lambda: BARS[bar][1](Path(place), int(size), *BARS[bar][2]))
    else:
        main()
