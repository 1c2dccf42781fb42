"""What to find out first on a GPU: python -m benches.gpu.contact WHAT. All of it, in order: ``first_contact.sh``.

device  bytes there and back, with and without registered memory; a registration that is refused leaves no error behind
link    the bus: registered and pageable memory, sizes of a copy, one way and both, and what a call costs the host
bits    training in every placement and with either memory: whether all have the same bits, and those of training in
        the GPU's memory
step    steps of one of the peers' sizes or of wide models with few layers, from a store within a budget of VRAM, and
        what torch's allocator and the driver really took

``device`` and ``bits`` fail where something is wrong. With ``--device simulated`` times mean nothing, but all of it
runs; there ``bits`` fails, too, where a bit is not that of training in memory.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

from benches.gpu import train_step
from benches.gpu.losses import ENVIRONMENT, TESTS, new_device, train_in_memory
from benches.step.contenders import SIZES, Size, config_of
from benches.step.ram_budget import size_of

MIB, GB = 1 << 20, 1e9
# Widths decide what a budget of VRAM must hold at once, and the number of layers does not.
WIDE = {
    "wide1B": Size(2048, 4, 6144, 151936),
    "wide8B": Size(4096, 4, 12288, 151936),
    "wide14B": Size(5120, 2, 13824, 152064),
}
SIZES |= WIDE
NOISE_PARAMETERS = 1 << 22
CHUNK_PARAMETERS = 4096


# ------------------------------------------------------------------------------------------------ device


def check_device(options: argparse.Namespace) -> list[str]:
    """Copies, registrations and events; what is wrong."""
    import torch

    wrong = []

    def check(what: str, *, holds: bool) -> None:
        print(f"{what}: {'yes' if holds else 'NO'}")
        if not holds:
            wrong.append(what)

    with closing(new_device(options.device)) as device:
        host = torch.randint(0, 255, (options.mib * MIB,), dtype=torch.uint8)
        back = torch.zeros_like(host)
        there = device.allocate(host.nbytes, "contact")

        def round_trip(when: str) -> None:
            back.zero_()
            device.copy_in(there, host)
            device.wait("out", device.record("in"), "what is copied out has come")
            device.copy_out(back, there)
            device.record("out").wait()
            check(f"bytes are equal after a round trip, {when}", holds=torch.equal(back, host))

        round_trip("never registered")
        with device.pin(host) as is_pinned, device.pin(back) as is_pinned_too:
            print(f"registered: {is_pinned}, {is_pinned_too}")
            round_trip("registered")
            if options.device == "cuda":
                with device.pin(host) as is_pinned_twice:
                    check("what is registered is refused", holds=not is_pinned_twice)
                with device.computing():
                    sums = torch.ones(1 << 20, device=device.torch_device) * 2
                check("the refusal leaves no error behind", holds=float(sums.sum()) == 2 << 20)
                round_trip("after the refusal")
        round_trip("no longer registered")
        began = time.monotonic_ns()
        event = device.record("compute")
        event.wait()
        ended, at = time.monotonic_ns(), event.at_ns()
        happened = "no time" if at is None else f"{(at - began) / 1e3:.1f} us"
        print(f"an event happened {happened} after its call began, which took {(ended - began) / 1e3:.1f} us")
    return wrong


# -------------------------------------------------------------------------------------------------- link


def measure_link(options: argparse.Namespace) -> None:
    """Rates of the bus."""
    import torch

    with closing(new_device(options.device)) as device:
        nbytes = options.mib * MIB
        hosts = [torch.full((nbytes,), value, dtype=torch.uint8) for value in (1, 2)]
        theirs = [device.allocate(nbytes, f"contact {number}") for number in (1, 2)]
        for is_registered in (False, True):
            with ExitStack() as registered:
                if is_registered:
                    began = time.perf_counter()
                    answers = [registered.enter_context(device.pin(host)) for host in hosts]
                    seconds = time.perf_counter() - began
                    print(f"registered {2 * options.mib} MiB in {seconds * 1e3:.1f} ms: {answers}")
                    if options.device == "cuda":
                        print(f"pinned by torch's account: {[host.is_pinned() for host in hosts]}")
                label = "registered" if is_registered else "pageable, through the ring"
                for size, ways in product(options.chunks, (("in",), ("out",), ("in", "out"))):
                    copies_per_s(device, hosts, theirs, size * MIB, ways, options.copies // 8 or 1)
                    rate, call = copies_per_s(device, hosts, theirs, size * MIB, ways, options.copies)
                    print(
                        f"{label:28}{size:4} MiB {'+'.join(ways):7}{rate * size * MIB / GB:8.2f} GB/s each way, "
                        f"host{call * 1e6:8.1f} us a call"
                    )
    if options.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        print(
            f"copy engines: {getattr(about, 'async_engine_count', 'torch does not say')}, capability "
            f"{about.major}.{about.minor}, {about.total_memory // MIB} MiB, of which free "
            f"{torch.cuda.mem_get_info()[0] // MIB}"
        )


def copies_per_s(
    device: Any, hosts: Sequence[Any], theirs: Sequence[Any], size: int, ways: Sequence[str], count: int
) -> tuple[float, float]:
    """Copies a second each way, and seconds that a call costs the host."""
    places = max(1, (hosts[0].nbytes - size) // size)
    in_calls, events = 0.0, []
    began = time.perf_counter()
    for number in range(count):
        part = slice(number % places * size, (number % places + 1) * size)
        called = time.perf_counter()
        if "in" in ways:
            device.copy_in(theirs[0][part], hosts[0][part])
        if "out" in ways:
            device.copy_out(hosts[1][part], theirs[1][part])
        events = [device.record(way) for way in ways]
        in_calls += time.perf_counter() - called
    for event in events:
        event.wait()
    return count / (time.perf_counter() - began), in_calls / count


# -------------------------------------------------------------------------------------------------- bits


def compare_bits(options: argparse.Namespace) -> list[str]:
    """Train in every placement; those whose bits differ, or that fail."""
    sys.path[:0] = [path for path in (str(TESTS), str(TESTS / "python" / "support")) if path not in sys.path]
    import torch

    from paged import Case, differing, expected_planes

    wrong = []
    with deterministic():
        for dtype, head in product(options.dtypes, options.heads):
            case = Case(
                tied=head == "tied",
                dtype=getattr(torch, dtype),
                counts=tuple(options.counts),
                overrides={"num_hidden_layers": options.layers},
            )
            results = {}
            for (placement, how), is_pinned in product(placements(case).items(), (True, False)):
                label = f"{dtype:8} {head:4} {placement:13} {'registered' if is_pinned else 'pageable':10}"
                try:
                    results[label] = train_placed(case, how, options, is_pinned=is_pinned)
                except Exception as error:  # noqa: BLE001 - the other placements are still to be seen
                    traceback.print_exc()
                    wrong.append(f"{label}: {type(error).__name__}")
            with closing(new_device(options.device)) as device:
                stock = train_in_memory(case, device.torch_device)
            in_memory = stock.losses, expected_planes(stock)
            first = next(iter(results.values()), in_memory)
            must_equal = [first, in_memory] if options.device == "simulated" else [first]
            for label, (losses, planes) in results.items():
                unlike_first, unlike_stock = (
                    len(differing(planes, theirs)) for _, theirs in (first, in_memory)
                )
                largest = max(abs(a - b) for a, b in zip(losses, in_memory[0], strict=True))
                print(
                    f"{label} of {len(planes)} planes unlike the first {unlike_first}, unlike in memory "
                    f"{unlike_stock}; losses differ by {largest:.3g} at most",
                    flush=True,
                )
                if any(losses != theirs or differing(planes, others) for theirs, others in must_equal):
                    wrong.append(f"{label}: other bits")
    if not wrong:
        print("all placements have the same bits")
    return wrong


def placements(case: Any) -> dict[str, dict[str, Any]]:
    """Where weights, gradients and activation checkpoints are, from what has room to the least."""
    from device_plans import GATHERED, LEAST, plan

    shapes = {"roomy": {}, "inputs in RAM": {"slots": 2}, "least": LEAST, "gathered": GATHERED}
    return {
        name: {
            "vram": plan(case, chunk_parameters=CHUNK_PARAMETERS, **shape),
            "small_pool": bool(shape),
            "resident_share": 0.3,
        }
        for name, shape in shapes.items()
    }


def train_placed(
    case: Any, how: Mapping[str, Any], options: argparse.Namespace, *, is_pinned: bool
) -> tuple[list[float], dict[Any, Any]]:
    """Losses and planes."""
    import paged

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Path(folder) / "store"
        paged.make_store(store, case, CHUNK_PARAMETERS, drives=1)
        device = new_device(options.device)
        with (
            paged.opened(store, case, drives=1, device=device, **how) as model,
            device.pin(model.state.pool_memory()) if is_pinned else nullcontext(),
        ):
            return paged.train(model, case), paged.all_planes(model.state)


@contextmanager
def deterministic() -> Iterator[None]:
    """Torch's deterministic kernels, and torch's own loss on both sides."""
    import torch

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = torch.are_deterministic_algorithms_enabled()
    liger = sys.modules.get("liger_kernel")
    torch.use_deterministic_algorithms(True)
    sys.modules["liger_kernel"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        del sys.modules["liger_kernel"]
        if liger is not None:
            sys.modules["liger_kernel"] = liger


# -------------------------------------------------------------------------------------------------- step


def measure_step(options: argparse.Namespace) -> None:
    """Steps from the drive, and what they took of the GPU."""
    import torch

    on_gpu = options.device == "cuda"
    vram, ram = size_of(options.vram), size_of(options.ram)
    store = options.folder / f"{options.size}.mtio"
    if not store.exists():
        began = time.perf_counter()
        make_store(store, SIZES[options.size])
        print(
            f"a store of {store.stat().st_size / GB:.1f} GB in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    job = {
        "size": options.size,
        "store": str(store),
        "frozen": False,
        "device": options.device,
        "vram": vram,
        "ram": ram,
        "tokens": options.tokens,
        "micro_batches": options.micro_batches,
        "steps": options.steps,
    }
    head = (
        f"{options.size}, VRAM {options.vram}, RAM {options.ram}, {options.micro_batches} micro-batches of "
        f"{options.tokens} tokens{'' if options.commits else ', no commits'}"
    )
    found: dict[str, Any] = {}
    with lowest_free() if on_gpu else nullcontext([0, 0]) as free:
        try:
            found = train_step.train(job, alone=alone_on_gpu if on_gpu else None, commits=options.commits)
        except Exception as error:  # noqa: BLE001 - what was taken until then is of interest, too
            print(f"{head}: FAILED, {type(error).__name__}: {str(error)[:600]}")
    if found:
        print(f"{head}\n{step_text(found)}")
    if on_gpu:
        taken = torch.cuda.memory_stats()
        print(
            f"VRAM in MiB: budget {vram // MIB}, allocated {taken['allocated_bytes.all.peak'] // MIB}, reserved "
            f"{taken['reserved_bytes.all.peak'] // MIB}, of the whole device {(free[0] - free[1]) // MIB} more than "
            f"before; allocations tried again {taken['num_alloc_retries']}, failed {taken['num_ooms']}"
        )
    if options.json is not None:
        everything = {"head": head, **found}
        options.json.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")
    if not found:
        sys.exit(1)


def step_text(found: Mapping[str, Any]) -> str:
    """The figures of a step, for people."""
    seconds, alone = statistics.median(found["seconds"]), found["compute_alone"]
    parameters, tokens, read, written = (found[name] for name in ("parameters", "tokens", "read", "written"))
    return (
        f"{found['vram']}\n{found['ram']}\n"
        f"step {seconds:.3f} s ({min(found['seconds']):.3f} to {max(found['seconds']):.3f}), computing alone "
        f"{alone:.3f} s, {alone / seconds:.2f} of it; hidden {found['hidden']:.0%}\n"
        f"{tokens / seconds:.0f} tokens/s, {8 * parameters * tokens / seconds / 1e12:.1f} TFLOP/s at 8 operations for "
        "each parameter and token\n"
        # Weights for both passes, gradients, and sums of them.
        f"bus at least {10 * parameters / seconds / GB:.2f} GB/s, both ways together\n"
        f"drive {(read + written) / seconds / GB:.2f} GB/s, {read / parameters:.2f} bytes read and "
        f"{written / parameters:.2f} written for each parameter\n"
        f"memory registered: {found['is_pinned']}; losses {found['losses'][:4]}"
    )


def make_store(path: Path, size: Size) -> None:
    """Random weights, the same few over and over: what they are decides no time, and drawing billions takes long."""
    import torch

    from megatrain_io.models.partition import PartitionedModel, model_parts
    from megatrain_io.models.probe import probe
    from megatrain_io.runs.import_model import create_store
    from megatrain_io.store.layout import ModelLayout, TensorPlace

    config = config_of(size)
    partition = PartitionedModel(config, torch.bfloat16, probe(config))
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), "bf16", durability="scratch")
    noise = 0.02 * torch.randn(NOISE_PARAMETERS, generator=torch.Generator().manual_seed(1))

    def values(place: TensorPlace, start: int, stop: int) -> Any:
        count = stop - start
        if len(place.shape) == 1:
            return torch.ones(count)
        return noise.repeat(-(-count // len(noise)))[:count]

    create_store([path], layout, values, model={}, blob=b"0")


def alone_on_gpu(partition: Any, layout: Any, batch: Any, device: Any) -> Mapping[Any, float]:
    """Computing alone has weights of embeddings, head and two blocks at once: the budget is not for that."""
    import torch

    from megatrain_io.paging.device.pool import CONTEXT_NBYTES
    from megatrain_io.planning.compute_time import measured_seconds

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0)
    try:
        return measured_seconds(partition, layout, batch, device)
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (device.vram - CONTEXT_NBYTES) / total))


@contextmanager
def lowest_free() -> Iterator[list[int]]:
    """Bytes of the GPU that are free: before, and the fewest since."""
    import torch

    free = [torch.cuda.mem_get_info()[0]] * 2
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.01):
            free[1] = min(free[1], torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield free
    finally:
        stopped.set()
        thread.join()


# -------------------------------------------------------------------------------------------- the command


def listed(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads ``1,4,8``."""
    return lambda text: [of(word) for word in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    commands = {
        name: what.add_parser(name, help=work.__doc__.partition("\n")[0])
        for name, work in (
            ("device", check_device),
            ("link", measure_link),
            ("bits", compare_bits),
            ("step", measure_step),
        )
    }
    for command in commands.values():
        command.add_argument("--device", choices=["cuda", "simulated"], default="cuda")
    for name in ("bits", "step"):
        commands[name].add_argument("--folder", type=Path, default=Path(), help="for stores")
    commands["device"].add_argument("--mib", type=int, default=64, help="that are copied")
    link = commands["link"]
    link.add_argument("--mib", type=int, default=256, help="of each of two buffers on either side")
    link.add_argument(
        "--chunks", type=listed(int), default=[1, 4, 8, 32], metavar="MIB,...", help="of a copy"
    )
    link.add_argument("--copies", type=int, default=64, help="of each kind")
    bits = commands["bits"]
    bits.add_argument(
        "--dtypes", type=listed(str), default=["bfloat16", "float32"], metavar="DTYPE,...", help="of weights"
    )
    bits.add_argument(
        "--counts", type=listed(int), default=[3, 2, 4], metavar="N,...", help="micro-batches of each step"
    )
    bits.add_argument("--layers", type=int, default=4)
    bits.add_argument("--heads", type=listed(str), default=["own", "tied"], metavar="own,tied")
    step = commands["step"]
    step.add_argument("size", choices=SIZES)
    step.add_argument("--vram", default="7.45GiB")
    step.add_argument("--ram", default="8GiB")
    step.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    step.add_argument("--micro-batches", type=int, default=8)
    step.add_argument("--steps", type=int, default=3)
    step.add_argument(
        "--no-commit", dest="commits", action="store_false", help="the drive is read from alone"
    )
    step.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    options = parser.parse_args(arguments)
    work = {"device": check_device, "link": measure_link, "bits": compare_bits, "step": measure_step}
    if wrong := work[options.what](options):
        sys.exit("\n".join(["WRONG", *wrong]))


if __name__ == "__main__":
    main()
