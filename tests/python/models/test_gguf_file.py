"""GGUF files of strangers: what is read is true of the file, and what is wrong is told in our own words."""

import os
import shutil
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from damage import damage
from gguf_models import make_model
from megatrain_io.cli.app import app
from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.models.gguf_families import GgufSource
from megatrain_io.models.gguf_file import GgufFile, GgufWriter, plan_gguf
from megatrain_io.models.gguf_folder import GgufFolder
from megatrain_io.models.gguf_weights import GgufWeights
from megatrain_io.runs.export_gguf import export_gguf
from megatrain_io.runs.import_model import import_model

DAMAGES = int(os.environ.get("MEGATRAIN_SOAK_DAMAGED_GGUF", "10"))
GROUP = 25
TYPES = [
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
]
CODES = {0, 2, 3, 4, 5, 6, 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model as GGUF."""
    there = tmp_path_factory.mktemp("gguf")
    make_model(there / "model", "smollm")
    import_model(there / "model", there / "run", precision="bf16", engine="threads")
    export_gguf(there / "run", there / "model.gguf", engine="threads")
    return there / "model.gguf"


def blocks(kind, elements, seed=0):
    """Sound random bytes of a type: scales are small numbers."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.random.default_rng(seed).integers(0, 256, (elements // size, width), dtype=np.uint8)
    if kind in {"F32", "F16", "BF16"}:
        values = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind]).tobytes()
    return (data & 0x3F).tobytes()  # exponents of fp16 that are neither infinite nor NaN


@pytest.mark.parametrize("kind", TYPES)
def test_any_part_of_a_tensor_is_what_the_library_makes_of_the_whole(tmp_path, kind):
    """The library alone reads the file from its own memory map; parts begin and end inside of blocks."""
    shape = (16, 512)
    data = blocks(kind, 16 * 512)
    plan = plan_gguf(
        {"general.architecture": "llama"}, [("a", kind, shape), ("b.attn_q.weight", kind, shape)]
    )
    with GgufWriter(tmp_path / "x.gguf", plan) as out:
        for name in ("a", "b.attn_q.weight"):
            out.write(name, 0, data)
    reader = gguf.GGUFReader(tmp_path / "x.gguf").tensors[0]
    expected = gguf.dequantize(reader.data, reader.tensor_type).reshape(shape)
    sources = {"plain": GgufSource("a"), "rotary": GgufSource("b.attn_q.weight", head=8)}
    turned = expected.reshape(2, 4, 2, 512).swapaxes(1, 2)
    with GgufWeights(GgufFile(tmp_path / "x.gguf"), sources, dict.fromkeys(sources, shape)) as weights:
        for name, values in (("plain", expected.reshape(-1)), ("rotary", turned.reshape(-1))):
            assert weights.entries[name].dtype == (kind if kind in {"F32", "F16", "BF16"} else "F32")
            for start, stop in ((0, 8192), (0, 1), (255, 258), (511, 4099), (5000, 8191), (7, 7)):
                found = np.frombuffer(weights.read(name, start, stop), dtype=np.uint8)
                wanted = values[start:stop]
                if kind == "F16":
                    wanted = wanted.astype(np.float16)
                elif kind == "BF16":
                    wanted = (wanted.view(np.uint32) >> 16).astype(np.uint16)
                assert found.tobytes() == wanted.tobytes(), (name, start, stop)


def test_what_is_written_is_what_the_library_writes(tmp_path):
    """The library's own writer makes the same bytes."""
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_int32("a.negative", -3)
    writer.add_float32("llama.eps", 1e-5)
    writer.add_bool("yes", val=True)
    writer.add_array("tokens", ["a", "ä▁"])
    writer.add_array("types", [1, 2, 3])
    writer.add_array("scores", [0.5, -1.0])
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(5, dtype=np.float16)
    writer.add_tensor("first", first)
    writer.add_tensor("second", second)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = {
        "general.architecture": "llama", "llama.block_count": 2, "a.negative": -3, "llama.eps": 1e-5, "yes": True,
        "tokens": ["a", "ä▁"], "types": [1, 2, 3], "scores": [0.5, -1.0],
    }  # fmt: skip
    plan = plan_gguf(metadata, [("first", "F32", (2, 3)), ("second", "F16", (5,))])
    with GgufWriter(tmp_path / "ours.gguf", plan) as out:
        out.write("second", 0, second.tobytes())
        out.write("first", 2, first.tobytes()[8:])
        out.write("first", 0, first.tobytes()[:8])
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    with GgufFile(tmp_path / "ours.gguf") as file:
        assert file.metadata == metadata | {"llama.eps": float(np.float32(1e-5))}


# ------------------------------------------------------------------------------------------- hostile headers


def header(keys=b"", infos=b"", *, tensors=0, count=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, count) + keys + infos


def text(value):
    return struct.pack("<Q", len(value)) + value


def info(name=b"t", dimensions=(32,), kind=0, offset=0):
    return (
        text(name)
        + struct.pack("<I", len(dimensions))
        + struct.pack(f"<{len(dimensions)}Q", *dimensions)
        + struct.pack("<IQ", kind, offset)
    )


BIG = 2**63
ALIGNMENT = text(b"general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer"),
        (header(magic=b"GGML"), "does not begin with GGUF"),
        (header(version=1), "is GGUF of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header()[:20], "goes on to byte 24 and the file ends at 20"),
        (header(tensors=BIG), "claims 9,223,372,036,854,775,808 tensors"),
        (header(count=BIG), "9,223,372,036,854,775,808 keys"),
        (header(struct.pack("<Q", BIG), count=1), "a string of 9,223,372,036,854,775,808 bytes"),
        (header(struct.pack("<Q", 4000), count=1), "goes on to byte 4,032 and the file ends at 32"),
        (header(text(b"k") + struct.pack("<I", 99), count=1), "'k' has the unknown type 99"),
        (header(text(b"k") + struct.pack("<IB", 7, 2), count=1), "'k' is neither true nor false"),
        (header(text(b"\xff") + struct.pack("<I", 4), count=1), "not UTF-8"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 4, BIG), count=1), "'k' has 9,223,372,036,854,775,808 entries"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 22), count=1), "goes on to byte"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1), count=1), "a list of the type 9"),
        (header((text(b"k") + struct.pack("<II", 4, 1)) * 2, count=2), "key 'k' occurs twice"),
        (header(ALIGNMENT + struct.pack("<I", 0), count=1), "its alignment is 0"),
        (header(ALIGNMENT + struct.pack("<I", 24), count=1), "its alignment is 24"),
        (header(ALIGNMENT + struct.pack("<I", 1 << 31), count=1), "its alignment is 2147483648"),
        (header(b"", info(dimensions=()), tensors=1), "has 0 dimensions"),
        (header(b"", info(dimensions=(1,) * 5), tensors=1), "has 5 dimensions"),
        (header(b"", info(dimensions=(0,)), tensors=1), r"has the shape \[0\]"),
        (header(b"", info(dimensions=(2**40, 2**40)), tensors=1), "has the shape"),
        (header(b"", info(dimensions=(33,), kind=8), tensors=1), "no whole blocks of Q8_0"),
        (header(b"", info(kind=4), tensors=1), "has the unknown type 4"),
        (header(b"", info(offset=32), tensors=1), "leaves a gap"),
        (header(b"", info(), tensors=1), "is truncated: its header says 192 bytes or more"),
        (header(b"", info() + info(b"u"), tensors=2) + bytes(500), "tensor 'u' overlaps the tensor before it"),
        (header(b"", info() + info(offset=128), tensors=2) + bytes(500), "tensor 't' occurs twice"),
        (header(b"", info(), tensors=1) + bytes(1000), "its header accounts for 192 only"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused_without_memory(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    gguf.GGUFValueType(0)  # imported before memory is counted
    tracemalloc.start()
    try:
        with pytest.raises(ModelFilesError, match=message):
            GgufFile(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def rewritten(path, target, **changes):
    """A copy of a file with other values of keys; None leaves a key out. Dots are written as two underscores."""
    with GgufFile(path) as file:
        metadata = dict(file.metadata)
        for name, value in changes.items():
            key = name.replace("__", ".")
            metadata.pop(key, None)
            if value is not None:
                metadata[key] = value
        infos = [(t.name, t.type, t.shape) for t in file.tensors.values()]
        plan = plan_gguf(metadata, infos)
        with GgufWriter(target, plan) as out:
            for tensor in file.tensors.values():
                out.write(tensor.name, 0, bytes(file.read(tensor, 0, tensor.elements // tensor.block[0])))
    return target


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"general__architecture": "clip"}, UnsupportedModelError, "of the architecture 'clip'; read are gemma2"),
        ({"general__type": "adapter"}, UnsupportedModelError, "holds no model"),
        ({"split__count": 3}, UnsupportedModelError, r"one of 3 files of a model.*llama-gguf-split --merge"),
        ({"llama__block_count": 10**6}, ModelFilesError, "claims 1,000,000 layers and has"),
        ({"llama__block_count": None}, ModelFilesError, "has no llama.block_count"),
        ({"llama__attention__head_count": [4, 4]}, ModelFilesError, r"head_count is \[4, 4\]"),
        ({"llama__attention__head_count": 0}, ModelFilesError, "claims 0 attention heads"),
        ({"llama__embedding_length": 2**31}, ModelFilesError, "hidden_size is 2,147,483,648"),
        ({"llama__attention__head_count_kv": 3}, ModelFilesError, r"k_proj.weight is \[32, 64\] in the files"),
        ({"llama__expert_count": 8}, UnsupportedModelError, "mixture of experts"),
        ({"llama__attention__sliding_window": 4}, UnsupportedModelError, "settings that are not known here"),
        ({"llama__rope__scaling__type": "longrope"}, UnsupportedModelError, "positions are scaled by 'longrope'"),
        ({"llama__rope__dimension_count": 8}, UnsupportedModelError, r"different sizes \(\[8, 16\]\)"),
        ({"tokenizer__ggml__model": "bert"}, UnsupportedModelError, "a tokenizer of the kind 'bert'"),
        ({"tokenizer__ggml__pre": "viking"}, UnsupportedModelError, "cuts text by the rule 'viking'"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, ModelFilesError, "2 tokens and 336 entries of token_type"),
        ({"tokenizer__ggml__tokens": ["a"] * 336}, ModelFilesError, "a token occurs twice"),
        ({"tokenizer__ggml__tokens": ["a" * 600] * 336}, ModelFilesError, "a token has 600 characters"),
        ({"tokenizer__ggml__merges": ["a  b"]}, ModelFilesError, "it has the merge 'a  b'"),
        ({"tokenizer__ggml__merges": ["xyz zyx"]}, ModelFilesError, "its tokenizer is damaged: it cannot be built"),
        ({"tokenizer__ggml__eos_token_id": 4000}, ModelFilesError, "its eos is token 4000 of 336"),
        ({"tokenizer__chat_template": 3}, ModelFilesError, "tokenizer.chat_template is no text"),
    ],
)  # fmt: skip
def test_what_a_file_says_is_looked_at(model, tmp_path, changes, kind, message):
    path = rewritten(model, tmp_path / "x.gguf", **changes)
    with pytest.raises(kind, match=message):
        import_model(path, tmp_path / "run", precision="bf16", engine="threads")
    assert not (tmp_path / "run").exists()


def test_what_begins_a_turn_does_not_end_a_text(model, tmp_path):
    """Files of SmolLM2 say so; the model ends its turns with <|im_end|>."""
    with GgufFile(model) as file:
        numbers = {token: i for i, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    start, end = numbers["<|im_start|>"], numbers["<|im_end|>"]
    ids = {"tokenizer__ggml__eos_token_id": start, "tokenizer__ggml__bos_token_id": start}
    folder = GgufFolder(rewritten(model, tmp_path / "x.gguf", **ids))
    assert folder.raw_config["eos_token_id"] == end
    assert any("ends turns with '<|im_end|>', which is taken" in note for note in folder.notes)
    assert folder.tokenizer().eos_token_id == end


# ------------------------------------------------------------------------------------------- damage


def attack(model, folder, seed):
    """A damaged copy of a file, and words for what was done."""
    path = folder / f"{seed}.gguf"
    path.write_bytes(model.read_bytes())
    return path, f"seed {seed}: {damage(path, seed)}"


def read_all(path):
    """Everything that an import reads."""
    folder = GgufFolder(path)
    folder.copy(["config.json", *folder.companions()], path.with_suffix(""))
    with folder.open_weights() as weights:
        for name, entry in weights.entries.items():
            assert len(weights.read(name, 0, entry.elements)) == entry.nbytes


@pytest.mark.parametrize("group", range(4))
def test_damage_is_survived_or_told(model, tmp_path, group):
    """What is refused is refused by one of our errors, with little memory."""
    problems = []
    for seed in range(group * GROUP, (group + 1) * GROUP):
        path, words = attack(model, tmp_path, seed)
        path.with_suffix("").mkdir()
        tracemalloc.start()
        try:
            read_all(path)
        except (ModelFilesError, UnsupportedModelError):
            pass
        except Exception as error:  # noqa: BLE001 - any other is a bug
            problems.append(f"{words}: {error!r}")
        if (peak := tracemalloc.get_traced_memory()[1]) > 64 << 20:
            problems.append(f"{words}: {peak >> 20} MiB")
        tracemalloc.stop()
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(max(DAMAGES // GROUP, 1)))
def test_a_damaged_file_is_imported_or_refused_in_a_sentence(model, tmp_path, monkeypatch, group):
    monkeypatch.chdir(tmp_path)
    problems = []
    for seed in range(1000 + group * GROUP, 1000 + group * GROUP + min(GROUP, DAMAGES)):
        path, words = attack(model, tmp_path, seed)
        done = CliRunner().invoke(app, ["import", path.name, f"run{seed}", "--precision", "bf16"])
        told = [line for line in done.output.splitlines() if line.startswith("megatrain-io: ")]
        is_unexpected = done.exception is not None and not isinstance(done.exception, SystemExit)
        if is_unexpected or done.exit_code not in CODES or len(told) != (done.exit_code != 0):
            problems.append(f"{words}: {done.exit_code}, {done.output} {done.exception!r}")
        shutil.rmtree(tmp_path / f"run{seed}", ignore_errors=True)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    assert not problems, "\n".join(problems)
