"""The contenders of ``compare.py``: what moves the bytes, each in a process of its own."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from benches.harness.comparison import MIB, SkippedError, answer, child

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
        "--name=contender",
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
    from megatrain_io.machine.measure import scratch_file, transfer

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
        wait_for(
            [store.put(name, tensor) for name, tensor in tensors.items()]
        )  # each extent is written once untimed
        with Clock() as clock:
            for _ in range(PASSES):
                wait_for([store.put(name, tensor) for name, tensor in tensors.items()])
        found["write"] = clock.figure(0, PASSES * total)
        tensor = None
        with Clock() as clock:
            for _ in range(PASSES):
                tensors.clear()  # their memory is what is read into
                tickets = {name: store.prefetch(name) for name in sizes}
                wait_for(list(tickets.values()))
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
                    wait_for([flying.popleft()])
                flying.append(ask(name))
        wait_for([*flying])
    turns = PASSES * half
    return clock.figure(turns * (2 * WEIGHT + UPDATE), turns * (WEIGHT + UPDATE))


def wait_for(tickets: list[Any]) -> None:
    """Wait for all of them, and take what was read: what nobody took is not read again by the next prefetch."""
    for ticket in tickets:
        ticket.wait()
        if hasattr(ticket, "result"):
            ticket.result()


def checksum(_folder: Path, nbytes: int) -> Figures:
    """What the store's checksums cost by themselves."""
    from megatrain_io.machine.measure import Workload, figure_of

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

# ------------------------------------------------------------------------------------------------- contenders

EXTENTS = [f"extents qd{depth}" for depth in DEPTHS_OF_EXTENTS]
# name: (group that goals compare, function in a process of its own, its arguments)
CONTENDERS: dict[str, tuple[str, Callable[..., Figures] | None, tuple[Any, ...]]] = {
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
    """One round of one contender."""
    group, work, arguments = CONTENDERS[name]
    nbytes = options.mib * MIB
    if work is not None:
        python = options.peer_python if group == "DeepNVMe" else sys.executable
        environment = {"DS_ACCELERATOR": "cpu"} if group == "DeepNVMe" else {}
        # Tools of a build (ninja) lie beside the interpreter.
        environment["PATH"] = f"{Path(python).parent}:{os.environ.get('PATH', '')}"
        return child(__spec__.name, python, [name, str(folder), str(nbytes)], environment)
    if shutil.which("fio") is None:
        raise SkippedError("fio is not installed")
    form, registered = arguments
    kinds = ("mixed",) if form.startswith("extents") else KINDS
    return {kind: fio(folder, nbytes, kind, form, registered=registered) for kind in kinds}


if __name__ == "__main__":
    contender, place, size = sys.argv[2:]
    answer(lambda: CONTENDERS[contender][1](Path(place), int(size), *CONTENDERS[contender][2]))
