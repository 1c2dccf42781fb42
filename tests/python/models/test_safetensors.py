"""The safetensors format: hostile files are refused, sound ones read and laid out as by the safetensors package."""

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from megatrain_io.errors import ModelFilesError
from megatrain_io.models import weight_file
from megatrain_io.models.safetensors import SafetensorsFile, plan_shards


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_a_read_is_cut_and_survives_short_reads(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.randn(3, 1001), "b": torch.randn(5)}, path)
    file = SafetensorsFile(path)
    entry = file.entries["a"]
    expected = safetensors.torch.load_file(path)["a"]
    asked = []
    preadv = os.preadv

    def short(descriptor, buffers, offset):
        asked.append(len(buffers[0]))
        return preadv(descriptor, [buffers[0][:700]], offset)

    monkeypatch.setattr(weight_file, "READ_BYTES_MAX", 1000)
    monkeypatch.setattr(os, "preadv", short)
    data = file.read(entry, 0, entry.elements)
    assert torch.equal(torch.frombuffer(data, dtype=torch.float32).view(entry.shape), expected)
    assert max(asked) == 1000
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ModelFilesError, match="was changed while it was read"):
        file.read(entry, 0, 1)
    file.close()


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"\xff\xfe{}",
        b"[" * 100_000,
        json.dumps({"a": tensor(offsets=(8, 16))}).encode(),
        json.dumps({"a": tensor(), "b": tensor(offsets=(4, 12))}).encode(),
        json.dumps({"a": tensor(), "b": tensor(offsets=(0, 8))}).encode(),
        json.dumps({"a": tensor(), "b": tensor(offsets=(12, 20))}).encode(),
        json.dumps({"a": tensor(offsets=(0, 12))}).encode(),
        json.dumps({"a": tensor(offsets=(8, 0))}).encode(),
        json.dumps({"a": tensor(offsets=(-8, 0))}).encode(),
        json.dumps({"a": tensor(offsets=(0, 8, 16))}).encode(),
        json.dumps({"a": tensor(shape=(-2,))}).encode(),
        json.dumps({"a": tensor(shape=(1 << 62, 1 << 62))}).encode(),
        json.dumps({"a": tensor(shape=("2",))}).encode(),
        json.dumps({"a": tensor(shape=(2.0,))}).encode(),
        json.dumps({"a": tensor(dtype="F31")}).encode(),
        json.dumps({"a": tensor(dtype=7)}).encode(),
        json.dumps({"a": 7}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [2]}}).encode(),
    ],
)
def test_hostile_headers_are_refused_as_by_the_safetensors_package(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ModelFilesError, match=r"x.safetensors (has|is)"):
        SafetensorsFile(path)
    with pytest.raises(SafetensorError):
        safetensors.safe_open(path, "pt").__enter__()


@pytest.mark.parametrize("claimed", [100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_is_not_allocated_before_its_length_is_believed(tmp_path, claimed):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}")
    with pytest.raises(ModelFilesError, match=r"claims a header of [\d,]+ bytes, at most 100,000,000"):
        SafetensorsFile(path)


def test_names_that_occur_twice_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    line = json.dumps(tensor())
    header = f'{{"a": {line}, "a": {line}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ModelFilesError, match="a name occurs twice"):
        SafetensorsFile(path)


def test_files_are_read_and_planned_as_by_the_safetensors_package(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
        "ints": torch.arange(6),
        "ü": torch.ones(2, dtype=torch.bool),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    for name, value in tensors.items():
        entry = file.entries[name]
        assert (entry.shape, entry.elements) == (tuple(value.shape), value.numel())
        assert bytes(file.read(entry, 0, entry.elements)) == bits(value).numpy().tobytes()
    assert bytes(file.read(file.entries["b"], 4, 9)) == bits(tensors["b"].view(-1)[4:9]).numpy().tobytes()
    file.close()
    planned = plan_shards([(e.name, e.dtype, e.shape) for e in file.entries.values()], 1 << 30)
    assert path.read_bytes().startswith(planned[0].header)
    assert planned[0].file_bytes == path.stat().st_size
