"""The made-up accelerator notices what it is there to notice."""

import threading
from contextlib import closing

import pytest
import torch

from megatrain_io.errors import DoesNotFitError
from megatrain_io.paging.device.simulated import OrderError, SimulatedDevice


@pytest.fixture
def device():
    with closing(SimulatedDevice(1)) as made:
        yield made


def floats(memory):
    return memory.view(torch.float32)


def test_a_copy_in_is_waited_for_by_compute(device):
    memory, content = floats(device.allocate(64, "test")), torch.arange(16.0)
    device.copy_in(memory, content)
    came = device.record("in")
    with device.computing(), pytest.raises(OrderError, match=r"reads .* of test, which copy in in in writes"):
        memory + 1
    device.wait("compute", came, "it has come")
    with device.computing():
        assert torch.equal(memory + 1, content + 1)


def test_an_event_before_the_copy_orders_nothing(device):
    memory = floats(device.allocate(64, "test"))
    too_early = device.record("in")
    device.copy_in(memory, torch.zeros(16))
    device.wait("compute", too_early, "too early")
    with device.computing(), pytest.raises(OrderError):
        memory.sum()


def test_memory_that_compute_reads_is_not_overwritten(device):
    memory = floats(device.allocate(64, "test"))
    device.copy_in(memory, torch.zeros(16))
    device.wait("compute", device.record("in"), "it has come")
    with device.computing():
        memory.sum()
    with pytest.raises(OrderError, match=r"copy in in in writes"):
        device.copy_in(memory, torch.ones(16))
    device.wait("in", device.record("compute"), "it was used")
    device.copy_in(memory, torch.ones(16))


def test_what_the_host_has_seen_orders_what_it_asks_for_then(device):
    memory = floats(device.allocate(64, "test"))
    device.copy_in(memory, torch.zeros(16))
    device.record("in").wait()
    with device.computing():
        memory.add_(1)
    device.record("compute").wait()
    device.copy_out(torch.empty(16), memory)


def test_parts_that_do_not_meet_need_no_order(device):
    memory = floats(device.allocate(64, "test"))
    device.copy_in(memory[:8], torch.zeros(8))
    with device.computing():
        memory[8:].zero_()
        with pytest.raises(OrderError):
            memory[7:].zero_()


def test_two_reads_need_no_order(device):
    memory = floats(device.allocate(64, "test"))
    with device.computing():
        memory.zero_()
    device.wait("out", device.record("compute"), "it is whole")
    device.copy_out(torch.empty(16), memory)
    with device.computing():
        memory.sum()
        with pytest.raises(OrderError, match=r"copy out in out reads"):
            memory.zero_()


def test_writes_and_reads_are_told_apart_by_the_operation(device):
    """`out=` and names that end in an underscore write, views do neither."""
    memory, other = floats(device.allocate(64, "a")), floats(device.allocate(64, "b"))
    with device.computing():
        memory.zero_()
        torch.add(memory, 1, out=other)
    device.wait("out", device.record("compute"), "it is whole")
    device.copy_out(torch.empty(16), other)
    with device.computing():
        other.view(4, 4).t().detach()
        with pytest.raises(OrderError):
            torch.add(memory, 1, out=other)


def test_a_copy_happens_later_and_keeps_its_memory_until_then(device):
    to, content = floats(device.allocate(64, "test")), torch.ones(16)
    hold = threading.Event()
    device._copies["in"].put(hold.wait)
    device.copy_in(to, content)
    event = device.record("in")
    assert not event.is_done()
    assert torch.isnan(to).all()
    hold.set()
    event.wait()
    assert event.is_done()
    assert torch.equal(to, content)


def test_a_stream_waits_for_another(device):
    a, b, out = floats(device.allocate(64, "a")), floats(device.allocate(64, "b")), torch.zeros(16)
    hold = threading.Event()
    device._copies["in"].put(hold.wait)
    device.copy_in(a, torch.ones(16))
    device.wait("out", device.record("in"), "it has come")
    device.copy_out(out, a)
    left = device.record("out")
    assert not left.is_done()
    hold.set()
    left.wait()
    assert torch.equal(out, torch.ones(16))
    del b


def test_its_memory_has_an_end():
    with closing(SimulatedDevice(nbytes=1000)) as device:
        device.allocate(600, "weights")
        with pytest.raises(DoesNotFitError, match="401 bytes for gradients do not fit its 1000"):
            device.allocate(401, "gradients")
        device.allocate(400, "gradients")
        assert device.accounts.nbytes == {"weights": 600, "gradients": 400}
        assert device.accounts.peak_nbytes == 1000


def test_ram_is_not_read_before_a_copy_out_has_written_it_nor_overwritten_while_it_is_read(device):
    memory, ram = floats(device.allocate(128, "test")), torch.zeros(16)
    first, second = memory[:16], memory[16:]
    device.copy_out(ram, first)
    with pytest.raises(OrderError, match=r"copy in in in reads .* of RAM, which copy out in out writes"):
        device.copy_in(second, ram)
    device.wait("in", device.record("out"), "it has left")
    device.copy_in(second, ram)
    with pytest.raises(OrderError, match=r"copy out in out writes .* of RAM, which copy in in in reads"):
        device.copy_out(ram, first)
    device.record("in").wait()
    device.copy_out(ram, first)
