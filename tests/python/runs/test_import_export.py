"""Import and export of model folders: the same bits in and out, and nothing half-done when it fails."""

import fcntl
import filecmp
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from megatrain_io.errors import (
    ConfigError,
    FormatError,
    ModelFilesError,
    NoSpaceError,
    StorageError,
    StoreInUseError,
)
from megatrain_io.models.hub_names import Piece
from megatrain_io.runs import import_model as import_module
from megatrain_io.runs.export_model import export_model
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.import_model import import_model
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.paged_store import AdamWStep, PagedStore, StoreCreator
from model_sources import (
    BF16,
    ENGINE,
    FAMILIES,
    FP16,
    FP32,
    NORM,
    TABLE,
    bring_in,
    check_refused,
    differing,
    edit,
    load,
    planes,
    rewrite,
    same,
    save,
)
from paged import Case, opened, to_micro_batch
from reference.reference import build, round_half_away, tiny_config


@pytest.fixture
def source(tmp_path):
    """A sound model folder with one file of weights."""
    return save(tmp_path / "source", tiny_config("llama", tied=True))


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ bits


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_every_plane_has_the_bits_of_the_files(tmp_path, run, dtype, precision):
    folder = save(tmp_path / "source", tiny_config("llama", tied=False), dtype, max_shard_size="100KB")
    bring_in(folder, run, precision)
    model = dict(load(folder).named_parameters())
    found = planes(run)
    assert {name for name, _ in found} == model.keys()
    for name, parameter in model.items():
        master = parameter.detach().float()
        weight = round_half_away(master) if precision == "bf16" else master
        assert parameter.dtype == dtype
        assert same(found[name, "weight"], weight)
        assert same(found[name, "master"], master)
        assert not found[name, "exp_avg"].any()
        assert not found[name, "exp_avg_sq"].any()


def test_a_tie_of_rounding_goes_away_from_zero(source, run):
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32).view(FP32)

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        tensors["model.norm.weight"][:3] = ties

    rewrite(source, change)
    bring_in(source, run)
    found = planes(run)
    assert same(found["model.norm.weight", "master"][:3], ties)
    assert found["model.norm.weight", "weight"][:3].view(torch.int16).tolist() == [0x3F81, 0x3F82, -0x407F]


@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_back_what_was_imported(tmp_path, run, family):
    folder = save(tmp_path / "source", FAMILIES[family]())
    bring_in(folder, run)
    export_model(run, tmp_path / "out", engine=ENGINE)
    assert differing(load(tmp_path / "out").state_dict(), load(folder).state_dict()) == []
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    # Not only the tensors: every file has the bytes that save_pretrained wrote.
    assert filecmp.cmpfiles(folder, tmp_path / "out", names, shallow=False) == (names, [], [])


def test_shards_and_index_are_those_of_save_pretrained(tmp_path, run):
    folder = save(tmp_path / "source", tiny_config("qwen3", tied=False), max_shard_size="50KB")
    bring_in(folder, run)
    export_model(run, tmp_path / "out", shard_bytes=50_000, engine=ENGINE)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) > 5
    assert filecmp.cmpfiles(folder, tmp_path / "out", names, shallow=False) == (names, [], [])


def test_trained_weights_are_exported_in_either_dtype(tmp_path, run):
    case = Case(tied=True, dtype=BF16, counts=(2,))
    folder = save(tmp_path / "source", case.config, FP32)
    bring_in(folder, run)
    with opened(run.store_paths()[0], case, engine=ENGINE, drives=1) as model:
        batches = [to_micro_batch(batch) for batch in case.steps[0]]
        model.train_step(batches, AdamWStep(1, 1e-3), lambda _: b"{}")
        model.state.wait_durable()
    trained = planes(run)
    for dtype, plane in ((None, "weight"), ("bf16", "weight"), ("fp32", "master")):
        out = tmp_path / f"out {dtype}"
        export_model(run, out, dtype=dtype, engine=ENGINE)
        found = dict(load(out).named_parameters())
        assert (
            differing(found, {name: value for (name, kind), value in trained.items() if kind == plane}) == []
        )
        assert (
            json.loads((out / "config.json").read_text())["dtype"]
            == str(found["model.norm.weight"].dtype)[6:]
        )
    assert not same(trained["model.norm.weight", "master"], load(folder).model.norm.weight)


def test_bf16_from_an_fp32_store_rounds_to_nearest_even(tmp_path, run):
    folder = save(tmp_path / "source", tiny_config("llama", tied=True), FP32)
    bring_in(folder, run, "fp32")
    export_model(run, tmp_path / "out", dtype="bf16", engine=ENGINE)
    expected = {name: value.to(BF16) for name, value in load(folder).state_dict().items()}
    assert differing(load(tmp_path / "out").state_dict(), expected) == []


def test_the_store_records_the_configuration_and_starts_at_step_zero(source, run):
    edit(source / "config.json", unusual=float("inf"))
    info = bring_in(source, run)
    assert run.path.stat().st_mode & 0o777 == 0o700
    with PagedStore(*run.store_paths(), engine=ENGINE) as state:
        assert TrainerState.parse(state.blob) == TrainerState(step=0)
        model = json.loads(state.manifest)["model"]
        assert (info.precision, info.stores, info.store_uuid) == ("bf16", ["store.mtio"], state.uuid)
    assert model["config"]["hidden_size"] == 64
    assert model["config"]["unusual"] == {"__float__": "Infinity"}
    assert model["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_only_files_on_the_list_are_copied(tmp_path, source, run):
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_llama.py", "optimizer.pt", "notes.json"):
        (source / name).write_text(name)
    bring_in(source, run)
    copied = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in run.model.iterdir()} == copied
    export_model(run, tmp_path / "out", engine=ENGINE)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*copied, "model.safetensors"}


# ------------------------------------------------------------------------------------------- memory


def test_no_read_is_larger_than_a_chunk_and_no_byte_is_read_twice(tmp_path, run, monkeypatch):
    folder = save(tmp_path / "source", FAMILIES["mixtral"](), FP32)
    reads, dropped = [], []
    preadv, posix_fadvise = os.preadv, os.posix_fadvise

    def counting_preadv(descriptor, buffers, offset):
        reads.append((offset, len(buffers[0])))
        return preadv(descriptor, buffers, offset)

    def counting_fadvise(descriptor, offset, length, advice):
        dropped.append((offset, length))
        posix_fadvise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "preadv", counting_preadv)
    monkeypatch.setattr(os, "posix_fadvise", counting_fadvise)
    bring_in(folder, run)
    assert dropped == reads
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    data = sum(tensor.nbytes for tensor in tensors.values())
    header = path.stat().st_size - data
    ranges = sorted((offset, length) for offset, length in reads if offset >= header)
    assert [offset for offset, _ in ranges[1:]] == [offset + length for offset, length in ranges[:-1]]
    assert sum(length for _, length in ranges) == data
    assert max(length for _, length in ranges) == 4 * 4096 < max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("shape", "start", "size"),
    [
        ((5, 4, 3), (2, 0, 0), (1, 4, 3)),
        ((5, 4, 3), (1, 2, 0), (3, 2, 3)),
        ((4, 6), (0, 1), (4, 2)),
        ((7,), (2,), (3,)),
        ((), (), ()),
        ((1, 1, 4), (0, 0, 1), (1, 1, 2)),
    ],
)
def test_runs_of_a_box_are_where_torch_puts_them(shape, start, size):
    piece = Piece("x", shape, start, size)
    whole = torch.full(shape, -1)
    inside = tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))
    whole[inside] = torch.arange(torch.Size(size).numel()).view(size)
    flat = whole.view(-1)
    for begin in range(len(flat)):
        for end in range(begin, len(flat) + 1):
            found = torch.full((end - begin,), -1)
            for place, source, count in piece.runs(begin, end):
                found[place - begin : place - begin + count] = torch.arange(source, source + count)
            assert torch.equal(found, flat[begin:end])


# -------------------------------------------------------------------------------------------- names


def test_a_tied_table_may_have_either_name_or_both(tmp_path, source):
    table = "model.embed_tokens.weight"
    expected = load(source).lm_head.weight

    def imported(change):
        rewrite(source, change)
        run = RunFolder(tmp_path / f"run {len(list(tmp_path.iterdir()))}")
        bring_in(source, run)
        return planes(run)[table, "weight"]

    assert same(
        imported(lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()})), expected
    )
    assert same(imported(lambda tensors: tensors.pop(table)), expected)
    with pytest.raises(ModelFilesError, match="hold two different ones: set tie_word_embeddings to false"):
        imported(lambda tensors: tensors.update({table: tensors["lm_head.weight"] + 1}))


@pytest.mark.parametrize("family", ["gpt2", "llama tied"])
def test_files_of_the_bare_model_fit_too(tmp_path, run, family):
    model = build(FAMILIES[family](), seed=1).to(BF16)
    model.base_model.save_pretrained(tmp_path / "source")
    bring_in(tmp_path / "source", run)
    export_model(run, tmp_path / "out", engine=ENGINE)
    assert differing(load(tmp_path / "out").state_dict(), model.state_dict()) == []


def test_buffers_of_old_files_are_passed_over(tmp_path, source, run):
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(source, lambda tensors: tensors.update({old: torch.ones(8, dtype=torch.float64)}))
    bring_in(source, run)
    folder = save(tmp_path / "gpt2", FAMILIES["gpt2"]())
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    rewrite(folder, lambda tensors: tensors.update({"transformer.h.0.attn.bias": mask}))
    bring_in(folder, RunFolder(tmp_path / "second run"))


def test_a_buffer_with_other_values_goes_through_and_one_that_is_no_number_is_refused(tmp_path, run):
    folder = save(tmp_path / "source", FAMILIES["apertus"]())
    name = "model.layers.1.mlp.act_fn.beta"
    rewrite(folder, lambda tensors: tensors[name].add_(1))
    bring_in(folder, run)
    export_model(run, tmp_path / "out", engine=ENGINE)
    assert differing(load(tmp_path / "out").state_dict(), load(folder).state_dict()) == []
    rewrite(folder, lambda tensors: tensors[name].mul_(float("nan")))
    check_refused(folder, RunFolder(tmp_path / "other"), ModelFilesError, f"{name}.* not a number")


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(NORM),
            r"model.norm.weight is missing in the files, \[64\] in the model",
        ),
        (
            lambda tensors: tensors.update({TABLE: torch.zeros(256, 64)}),
            r"model.embed_tokens.weight is \[256, 64\] in the files, \[257, 64\] in the model",
        ),
        (
            rename(NORM, "model.nrom.weight"),
            r"model.nrom.weight \[64\] has no place in the model; model.norm.weight is",
        ),
        (
            lambda tensors: [tensors.pop(f"model.layers.{i}.input_layernorm.weight") for i in range(4)],
            r"layers.0.*layers.1.*layers.2.input_layernorm.weight is missing .*; and 1 more",
        ),
        (lambda tensors: tensors.pop(TABLE), r"model.embed_tokens.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(source, run, change, message):
    rewrite(source, change)
    check_refused(source, run, ModelFilesError, message)


def test_a_missing_expert_is_noticed(tmp_path, run):
    folder = save(tmp_path / "source", FAMILIES["qwen3_moe"]())
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.down_proj.weight"))
    check_refused(
        folder, run, ModelFilesError, r"experts.down_proj is \[4, 64, 32\] in the files, \[5, 64, 32\]"
    )
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.3.up_proj.weight"))
    check_refused(
        folder, run, ModelFilesError, r"parts of model.layers.0.mlp.experts.gate_up_proj do not fit"
    )


# ------------------------------------------------------------------------- failures, and nothing left


def stop(done, _total):
    if done == 3:
        raise KeyboardInterrupt


def test_an_import_that_is_stopped_leaves_nothing(tmp_path, source, run):
    with pytest.raises(KeyboardInterrupt):
        bring_in(source, run, stores=[tmp_path / "fast" / "disk" / "store"], progress=stop)
    assert list(tmp_path.iterdir()) == [source]


def test_an_import_that_is_stopped_when_its_store_has_its_name_leaves_nothing(
    tmp_path, source, run, monkeypatch
):
    """Making it durable takes seconds in which no signal is looked at: Ctrl-C comes when the store is finished."""

    class Interrupted:
        def __init__(self, *arguments):
            self._creator = StoreCreator(*arguments)

        def __getattr__(self, name):
            return getattr(self._creator, name)

        def finish(self, blob):
            self._creator.finish(blob)
            assert run.own_store.exists()
            raise KeyboardInterrupt

    monkeypatch.setattr(import_module, "StoreCreator", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_model(source, run)
    assert list(tmp_path.iterdir()) == [source]


def test_an_import_that_fails_at_its_end_leaves_what_was_there(tmp_path, source, run, monkeypatch):
    run.path.mkdir()
    run.config.write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write", full)
    with pytest.raises(NoSpaceError, match=r"No space left on device.*nothing was left behind"):
        bring_in(source, run)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_import_whose_last_flush_fails_leaves_nothing(tmp_path, source, run, monkeypatch):
    """The model's folder had its name by then, and stayed in the way of the next import."""
    sync = import_module.sync_folder

    def failing(folder):
        if run.model.exists():
            raise OSError(5, "Input/output error", str(folder))
        sync(folder)

    monkeypatch.setattr(import_module, "sync_folder", failing)
    with pytest.raises(StorageError, match=r"Input/output error.*nothing was left behind"):
        bring_in(source, run)
    assert list(tmp_path.iterdir()) == [source]


def test_what_belongs_to_a_store_is_durable_before_it_has_its_name(source, run, monkeypatch):
    """A power cut just after an import took the model's files and left the store."""
    seen = []
    monkeypatch.setattr(import_module, "sync_folder", lambda folder: seen.append(folder.name))
    create = import_module.create_store

    def creating(*arguments, **keywords):
        seen.append("store")
        return create(*arguments, **keywords)

    monkeypatch.setattr(import_module, "create_store", creating)
    bring_in(source, run)
    assert seen == ["model.partial", run.path.name, "store", run.path.name]


def test_an_import_that_was_killed_can_be_repeated(source, run):
    (run.model.with_name("model.partial") / "deep").mkdir(parents=True)
    bring_in(source, run, progress=lambda *_: None)
    assert sorted(path.name for path in run.path.iterdir()) == ["model", "run.json", "store.mtio"]


def test_a_folder_with_an_import_is_not_touched(source, run):
    bring_in(source, run)
    with pytest.raises(ConfigError, match=r"already holds a model, imported from .*source"):
        bring_in(source, run)
    run.info_file.unlink()
    with pytest.raises(ConfigError, match=r"already holds a model, imported from .*source"):
        bring_in(source, run)
    run.info_file.unlink()
    (run.path / "store.mtio").unlink()
    with pytest.raises(ConfigError, match=r"model is in the way.*Choose another output_dir"):
        bring_in(source, run)


def test_an_unknown_precision_is_refused(tmp_path, source, run):
    with pytest.raises(ConfigError, match="precision is 'bfloat16': it must be one of bf16, fp32"):
        bring_in(source, run, "bfloat16")
    bring_in(source, run)
    with pytest.raises(ConfigError, match="dtype is 'fp16'"):
        export_model(run, tmp_path / "out", dtype="fp16", engine=ENGINE)


def test_a_run_folder_that_cannot_be_made_is_a_storage_error(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        bring_in(source, RunFolder(tmp_path / "file" / "run"))


@pytest.fixture
def imported(source, run):
    bring_in(source, run)
    return run


def test_an_export_overwrites_nothing(tmp_path, imported):
    out = tmp_path / "out"
    out.mkdir()
    export_model(imported, out, engine=ENGINE)  # an empty folder is welcome
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        export_model(imported, out, engine=ENGINE)
    with pytest.raises(ConfigError, match="shard_bytes is 0"):
        export_model(imported, tmp_path / "other", shard_bytes=0, engine=ENGINE)
    with pytest.raises(ConfigError, match="is not a run folder"):
        export_model(RunFolder(tmp_path / "no run"), tmp_path / "other", engine=ENGINE)


def test_what_a_killed_export_left_is_taken_over(tmp_path, imported, monkeypatch):
    """It stayed, and the next export was refused until somebody removed it."""
    export_model(imported, tmp_path / "whole", engine=ENGINE)
    shutil.copytree(tmp_path / "whole", tmp_path / "next.partial")
    (tmp_path / "next.partial" / "model-00001-of-00002.safetensors").write_bytes(bytes(9 << 20))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=100, f_frsize=4096))
    export_model(imported, tmp_path / "next", engine=ENGINE)  # in the room that the rest of it took
    assert not (tmp_path / "next.partial").exists()
    found = {path.name: path.read_bytes() for path in (tmp_path / "next").iterdir()}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_what_another_export_holds_or_none_wrote_is_left_alone(tmp_path, imported):
    partial = tmp_path / "next.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("mine")
    (partial / "config.json").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"next.partial is where .* 1 files that are not of one \(thesis.tex\)"
    ):
        export_model(imported, tmp_path / "next", engine=ENGINE)
    assert sorted(path.name for path in partial.iterdir()) == ["config.json", "thesis.tex"]
    (partial / "thesis.tex").unlink()
    holder = os.open(partial, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match=r"next.partial is of an export that runs: wait"):
        export_model(imported, tmp_path / "next", engine=ENGINE)
    assert (partial / "config.json").read_text() == "mine"
    os.close(holder)
    (partial / "config.json").unlink()
    partial.rmdir()
    partial.write_text("mine")
    with pytest.raises(ConfigError, match=r"next.partial is where .* no folder: move it away"):
        export_model(imported, tmp_path / "next", engine=ENGINE)
    assert partial.read_text() == "mine"


def test_an_export_that_does_not_fit_is_not_begun(tmp_path, imported, monkeypatch):
    weights = (tmp_path / "source" / "model.safetensors").stat().st_size
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
    with pytest.raises(
        NoSpaceError, match=r"needs [\d,]+ bytes, 40,960 are free in .*nothing was written"
    ) as caught:
        export_model(imported, tmp_path / "deep" / "out", engine=ENGINE)
    needed = int(str(caught.value).split(" bytes")[0].split()[-1].replace(",", ""))
    assert weights < needed < weights + (2 << 20)
    assert not (tmp_path / "deep").exists()


def test_an_export_that_is_stopped_leaves_nothing(tmp_path, imported, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        export_model(imported, tmp_path / "out", engine=ENGINE, progress=stop)
    assert sorted(tmp_path.rglob("*")) == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match="No space left"):
        export_model(imported, tmp_path / "out", engine=ENGINE)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_of_another_runs_store_is_refused(tmp_path, source, imported):
    other = RunFolder(tmp_path / "other")
    bring_in(source, other)
    shutil.copy(other.store_paths()[0], imported.store_paths()[0])
    with pytest.raises(FormatError, match=r"is store .*, and .* names .*: it belongs to another run"):
        export_model(imported, tmp_path / "out", engine=ENGINE)


def test_an_export_with_another_configuration_is_refused(tmp_path, imported):
    edit(Path(imported.model) / "config.json", num_hidden_layers=3)
    with pytest.raises(
        ModelFilesError, match=r"config.json is not the one of the import: num_hidden_layers is 3, and"
    ):
        export_model(imported, tmp_path / "out", engine=ENGINE)


def test_a_second_import_leaves_the_first_alone(source, run):
    """It removed the model files of the one that ran, which then removed its store."""
    (run.path / "model.partial").mkdir(parents=True)
    with run.importing(), pytest.raises(StoreInUseError, match="another process imports"):
        import_model(source, run, precision="bf16", engine=ENGINE)
    assert (run.path / "model.partial").exists()
