"""What strangers write: safetensors headers, trainer states and manifests, refused in our own words.

What is accepted is true of the file; nothing is believed beforehand.
"""

import json
import os
import struct
import tempfile
import tracemalloc
from contextlib import contextmanager
from math import prod
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from megatrain_io.errors import ConfigError, FormatError, ModelFilesError
from megatrain_io.models.safetensors import SafetensorsFile
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.layout import ModelLayout

BITS = {"F32": 32, "BF16": 16, "I64": 64, "U8": 8, "F4": 4, "F6_E2M3": 6, "BOOL": 8}

# ------------------------------------------------------------------------------- what strangers write

numbers = st.one_of(
    st.integers(-2, 64),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400]),
    st.floats(),
    st.booleans(),
)
names = st.one_of(st.sampled_from(["a", "b", "", "__metadata__", "\0", "\ud800"]), st.text(max_size=8))
anything = st.recursive(
    st.one_of(st.none(), numbers, names),
    lambda inner: st.one_of(st.lists(inner, max_size=9), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)
almost_a_tensor = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(list(BITS)), anything),
        "shape": st.one_of(st.lists(numbers, max_size=9), anything),
        "data_offsets": st.one_of(st.lists(numbers, min_size=1, max_size=3), anything),
        "more": anything,
    },
)


@st.composite
def sound(draw):
    """A header that is in order, as a dictionary, and the bytes of data that belong to it."""
    header, end = {}, 0
    for name in draw(st.lists(st.text(min_size=1, max_size=6), max_size=5, unique=True)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3)) + ([4] if BITS[dtype] < 8 else [])
        begin, end = end, end + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, end


@st.composite
def spoilt(draw):
    """A sound file in which some values, or some bytes, are others."""
    header, data_bytes = draw(sound())
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=2)) if header else []:
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        value = header[name][field]
        if isinstance(value, list) and value and draw(st.booleans()):
            value[draw(st.integers(0, len(value) - 1))] = draw(numbers)
        else:
            header[name][field] = draw(anything)
    text = bytearray(json.dumps(header).encode())
    for _ in range(draw(st.integers(0, 2))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    claimed = draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1), st.integers(0, 2 * len(text))))
    return struct.pack("<Q", claimed) + bytes(text) + bytes(draw(st.integers(0, 4)) * 8 + data_bytes)


# ---------------------------------------------------------------------------------------- the reading


@contextmanager
def file_of(content):
    descriptor, path = tempfile.mkstemp(suffix=".safetensors")
    try:
        os.write(descriptor, content)
        os.close(descriptor)
        yield Path(path)
    finally:
        Path(path).unlink()


def check(content):
    """Opens a file of this content: our own error and little memory, or tensors inside it that can be read."""
    with file_of(content) as path:
        tracemalloc.start()
        try:
            file = SafetensorsFile(path)
        except ModelFilesError as error:
            assert_refused_by_the_package_too(path, str(error))
            return
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            # A few copies of the header as bytes, text and objects, whatever numbers are in it.
            assert peak < 200_000 + 100 * len(content), f"{peak:,} bytes for a file of {len(content):,}"
        try:
            for entry in file.entries.values():
                assert 0 <= entry.offset <= entry.offset + entry.nbytes <= len(content)
                if BITS.get(entry.dtype, 8) >= 8:
                    found = file.read(entry, 0, entry.elements)
                    assert found == content[entry.offset : entry.offset + entry.nbytes]
        finally:
            file.close()


STRICTER = [
    "the shape",
    "not valid safetensors: a name occurs twice",
    "must have dtype, shape and data_offsets",
]
"""What is refused here on purpose though the safetensors package takes it: more than 8 dimensions, names twice
and fields that it does not know."""


def assert_refused_by_the_package_too(path, reason):
    if any(word in reason for word in STRICTER):
        return
    try:
        safe_open(path, "pt").__enter__()
    except (SafetensorError, OSError):
        return
    raise AssertionError(f"the safetensors package takes what is refused here: {reason}")


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, st.one_of(almost_a_tensor, anything), max_size=4), st.integers(0, 64))
@example({"\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, 4)
def test_headers_of_any_json_are_refused_or_describe_what_is_there(header, data_bytes):
    text = json.dumps(header).encode()
    check(struct.pack("<Q", len(text)) + text + bytes(data_bytes))


@settings(max_examples=200, deadline=None)
@given(spoilt())
def test_spoilt_files_are_refused_or_describe_what_is_there(content):
    check(content)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
@example(b"9" * 5000, True)
@example(b'{"a":' * 20_000, True)
@example(b"[" * 20_000 + b"]" * 20_000, True)
def test_any_bytes_are_refused_or_describe_what_is_there(content, framed):
    check(struct.pack("<Q", len(content)) + content if framed else content)


@given(sound())
def test_sound_files_are_read(made):
    header, data_bytes = made
    text = json.dumps(header).encode()
    with file_of(struct.pack("<Q", len(text)) + text + bytes(data_bytes)) as path:
        file = SafetensorsFile(path)
        assert file.entries.keys() == header.keys()
        file.close()


# -------------------------------------------------------------------------------- stores of strangers

almost_a_state = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(TrainerState.__dataclass_fields__, anything)
)


@given(
    st.one_of(
        st.binary(max_size=40),
        st.one_of(anything, almost_a_state).map(lambda value: json.dumps(value).encode()),
    )
)
@settings(max_examples=300, deadline=None)
@example(b"")
@example(b"[]")
@example(b'{"step": "3"}')
@example(b'{"version": 2}')
def test_a_trainer_state_of_a_stranger_is_refused_or_sound(blob):
    try:
        progress = TrainerState.parse(blob)
    except (FormatError, ConfigError):
        return
    assert type(progress.step) is int
    assert progress.step >= 0
    assert TrainerState.parse(progress.encode()) == progress


@given(anything)
@settings(max_examples=200, deadline=None)
@example({"blocks": 1})
@example({"blocks": True})
def test_a_manifest_of_a_stranger_is_refused_or_sound(model):
    """The core checks everything but `model`, which it does not interpret."""
    manifest = json.loads(ModelLayout.build([("a", [("w", (3,))]), ("b", [])], 1, "f32", 4096).manifest({}))
    try:
        layout = ModelLayout.from_manifest(json.dumps(manifest | {"model": model}))
    except FormatError:
        return
    assert layout.blocks == model["blocks"]
