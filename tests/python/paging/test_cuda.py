"""What of the GPU's side needs no GPU: memory that cannot be registered, and which device is chosen.

Torch's own calls are replaced by ones that only remember; streams and events do what a test tells them.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_device import check

from device_plans import GATHERED, LEAST, plan
from megatrain_io.errors import ConfigError, UnsupportedError
from megatrain_io.paging.device import cuda
from megatrain_io.paging.device.choose import best_device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.cuda import Cuda
from megatrain_io.planning.resolve import gpu_here, resolve_device
from paged import Case

MIB = 1 << 20


class FakeEvent:
    happened = True

    def __init__(self, enable_timing=False):
        pass

    def record(self, stream=None):
        self.stream = stream

    def query(self):
        return FakeEvent.happened and getattr(self, "happened_too", True)

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        # Milliseconds in fp32, as CUDA has them.
        return float(torch.tensor((other.at - self.at) / 1e6, dtype=torch.float32))


class FakeStream:
    def __init__(self, _device=None):
        self.waited = []

    def synchronize(self):
        self.waited.append("host")

    def wait_event(self, event):
        self.waited.append(event)


class FakeCudart:
    def __init__(self):
        self.refuses = 0
        self.calls = []

    def cudaHostRegister(self, start, nbytes, flags):  # noqa: N802 - CUDA's name
        self.calls.append(("register", start, nbytes, flags))
        return self.refuses

    def cudaHostUnregister(self, start):  # noqa: N802
        self.calls.append(("unregister", start))
        return 0


@pytest.fixture
def cudart():
    return FakeCudart()


@pytest.fixture
def gpu(monkeypatch, cudart):
    """A GPU whose memory is RAM."""
    share = []
    fake = SimpleNamespace(
        is_available=lambda: True,
        set_device=lambda _: None,
        get_device_properties=lambda _: SimpleNamespace(name="GPU", total_memory=8192 * MIB),
        empty_cache=lambda: None,
        mem_get_info=lambda _=None: (7000 * MIB, 8192 * MIB),
        get_device_name=lambda: "GPU",
        set_per_process_memory_fraction=lambda part, _: share.append(part),
        current_stream=FakeStream,
        Stream=FakeStream,
        Event=FakeEvent,
        stream=lambda _: nullcontext(),
        cudart=lambda: cudart,
        is_bf16_supported=lambda including_emulation: including_emulation,
    )
    monkeypatch.setattr(cuda.torch, "cuda", fake)
    empty = torch.empty

    def unpinned(*size, **how):
        how.pop("pin_memory", None)
        return empty(*size, **how)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(FakeEvent, "happened", True)
    made = Cuda(4096 * MIB)
    assert share == [(4096 - 600) / 8192]
    made.torch_device = torch.device("cpu")
    return made


def test_memory_is_registered_as_it_is_and_let_go_when_nothing_moves(gpu, cudart):
    memory = torch.zeros(4096, dtype=torch.uint8)
    with gpu.pin(memory) as is_pinned:
        assert is_pinned
        assert cudart.calls == [("register", memory.data_ptr(), 4096, 0)]
        gpu.copy_out(memory[:64], torch.ones(64, dtype=torch.uint8))
        assert memory[:64].sum() == 64, "straight, without a detour"
    assert cudart.calls[1:] == [("unregister", memory.data_ptr())]
    assert gpu._streams["in"].waited == gpu._streams["out"].waited == ["host"]


def test_times_keep_their_grain_for_hours(gpu, monkeypatch):
    begun = gpu._origin.ns
    clock = SimpleNamespace(now=begun)
    monkeypatch.setattr(cuda.time, "monotonic_ns", lambda: clock.now)
    gpu._origin.event.at = begun
    for seconds in range(0, 10 * 3600, 50):
        clock.now = begun + seconds * 10**9 + 12_345
        recorded = gpu.record("compute")
        recorded.event.at = clock.now
        assert abs(recorded.at_ns() - clock.now) < 50_000
    clock.now += 61 * 10**9
    origin, later = gpu.record("out"), gpu.record("compute")
    origin.event.happened_too, later.event.at = False, clock.now
    assert gpu._origin.event is origin.event
    assert later.at_ns() is None, "its origin has not happened"


def test_refused_memory_leaves_no_error_behind(gpu, cudart, monkeypatch):
    cudart.refuses = 2
    launched = []

    def zeros(*_, **__):
        launched.append(True)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    with gpu.pin(torch.empty(64, dtype=torch.uint8)) as is_pinned:
        assert not is_pinned
    assert launched, "a kernel has taken the error away"
    assert [name for name, *_ in cudart.calls] == ["register"]


def test_a_copy_out_of_memory_that_is_not_registered_lands_when_it_has_happened(gpu):
    to = torch.zeros(8)
    FakeEvent.happened = False
    gpu.copy_out(to, torch.ones(8))
    event = gpu.record("out")
    assert not event.is_done()
    assert to.sum() == 0
    FakeEvent.happened = True
    assert event.is_done()
    assert to.sum() == 8


def test_memory_of_the_driver_is_used_again_only_when_its_copy_has_landed(gpu):
    places = [torch.zeros(8) for _ in range(6)]
    FakeEvent.happened = False
    events = []
    for number, place in enumerate(places):
        gpu.copy_out(place, torch.full((8,), float(number + 1)))
        events.append(gpu.record("out"))
    assert [int(place[0]) for place in places] == [1, 2, 0, 0, 0, 0], "the first two made room for the last"
    # An event that was late does not land what its memory holds now.
    FakeEvent.happened = True
    assert events[0].is_done()
    assert int(places[4][0]) == 0
    for event in events:
        event.wait()
    assert [int(place[0]) for place in places] == [1, 2, 3, 4, 5, 6]


def test_a_copy_in_frees_what_it_came_from(gpu):
    content = torch.ones(8)
    to = torch.zeros(8)
    gpu.copy_in(to, content)
    content.zero_()
    assert to.sum() == 8
    larger = torch.zeros(64)
    for _ in range(6):
        gpu.copy_in(larger, torch.ones(64))
    assert larger.sum() == 64


def test_what_comes_in_from_memory_that_is_not_registered_has_landed_there_before(gpu):
    ram, device = torch.zeros(16), torch.zeros(8)
    FakeEvent.happened = False
    gpu.copy_out(ram[:8], torch.ones(8))
    gpu.wait("in", gpu.record("out"), "it has left")
    gpu.copy_in(device, ram[8:])
    assert ram.sum() == 0, "another place need not wait"
    gpu.copy_in(device, ram[4:12])
    assert device.tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("chunk_parameters", [4096, 1 << 20])
@pytest.mark.parametrize("gathers", [False, True], ids=["on the device", "gathering"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_with_memory_that_is_not_registered_has_the_bits_of_stock_training(
    tmp_path, monkeypatch, gpu, cudart, tied, gathers, chunk_parameters
):
    """Torch computes on the CPU, and all that `Cuda` asks of CUDA is made up: copies take the detour."""
    cudart.refuses = 1
    made_up = torch.cuda
    for name in ("manual_seed", "get_rng_state", "set_rng_state"):
        setattr(made_up, name, lambda *_: None)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "torch", Torch(made_up))
        case = Case(tied=tied, dtype=torch.bfloat16, counts=(2, 2), overrides={"num_hidden_layers": 3})
        buffers = GATHERED if gathers else LEAST
        vram = plan(case, chunk_parameters=chunk_parameters, **buffers)
        check(tmp_path / "store", case, gpu, vram=vram, chunk_parameters=chunk_parameters)


class Torch:
    """Torch with another ``cuda``, and memory that is pinned by its name alone."""

    def __init__(self, cuda):
        self.cuda = cuda

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, pin_memory=False, **how):
        del pin_memory
        return torch.empty(*size, **how)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_that_is_emulated_is_none(gpu, monkeypatch, has_bf16):
    supported = lambda including_emulation: including_emulation or has_bf16  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not gpu.has_bf16
    assert resolve_device("auto", None).has_bf16 == has_bf16
    assert gpu_here("auto").has_bf16 == has_bf16
    assert best_device("fp32").name == "GPU"
    assert best_device("bf16").name == ("GPU" if has_bf16 else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_computes_or_it_is_said():
    assert isinstance(resolve_device("auto", None), Cpu)
    with pytest.raises(UnsupportedError, match="torch finds no CUDA device here"):
        resolve_device("cuda", None)
    with pytest.raises(UnsupportedError, match="torch finds no CUDA device here"):
        gpu_here("cuda")  # as plan asks
    for name in ("auto", "cpu"):
        with pytest.raises(ConfigError, match=r"memory\.vram is set, and the CPU computes"):
            resolve_device(name, 1 << 30)
