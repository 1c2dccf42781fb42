"""The files of a run: bound to it, made anew from the store where they are lost, and refused by name where changed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.machine.drive import mount_of, read_mounts
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.metrics import MetricsFile, last_report
from megatrain_io.runs.state import TrainerState
from runs import check_equals, configured, figures, metrics_of, start


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="megatrain-io")


def told(result, code):
    """The last line of standard error, of a command that ended with this code and no traceback."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    return result.stderr.strip().splitlines()[-1]


def train(source, run, code, **changes):
    path = run.parent / "my.yaml"
    path.write_text(configured(source, run, **changes).to_yaml())
    return told(call("train", "--config", path, "--resume"), code)


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


@pytest.fixture
def own_source(source, tmp_path):
    """The model folder, to be changed, and a run of it that stands at step 3."""
    shutil.copytree(source, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def run(own_source, stopped):
    """A run that stands at step 3, and came from ``own_source``."""
    folder = RunFolder(stopped)
    info = json.loads(folder.info_file.read_text())
    folder.info_file.write_text(json.dumps({**info, "source": str(own_source / "model")}))
    return stopped


# -------------------------------------------------------------------------------------- files of the model


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1.1e-6}, {"hidden_act": "gelu"}])
def test_a_changed_configuration_is_refused_everywhere(own_source, run, tmp_path, change):
    """One digit of it, and a run went on with other bits, without a word."""
    path = run / "model" / "config.json"
    before = path.read_bytes()
    edited(path, **change)
    key, value = next(iter(change.items()))
    sentence = f"{path} is not the one of the import: {key} is {json.dumps(value)}, and was "
    for line in (
        train(own_source, run, 5),
        told(call("generate", run, "--prompt", "the"), 5),
        told(call("export", run, tmp_path / "out"), 5),
    ):
        assert sentence in line
    command = line.partition("Put it back: ")[2].partition(";")[0].split()
    assert command[0] == "cp"
    shutil.copy(*command[1:])
    assert path.read_bytes() == before
    train(own_source, run, 0)


def test_a_configuration_that_says_the_same_in_other_words_is_fine(own_source, run, whole):
    path = run / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    train(own_source, run, 0)
    check_equals(run, whole)


def test_a_run_of_an_earlier_version_opens_and_its_configuration_is_compared_with_the_store(own_source, run):
    """It wrote down no hashes."""
    info = json.loads((run / "run.json").read_text())
    del info["files"]
    (run / "run.json").write_text(json.dumps(info))
    before = (run / "model" / "config.json").read_text()
    edited(run / "model" / "config.json", rope_theta=10001.0)
    assert "config.json is not the one of the import: " in train(own_source, run, 5)
    (run / "model" / "config.json").write_text(before)
    train(own_source, run, 0)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_was_changed_is_refused_and_one_that_is_missing_comes_back(
    own_source, run, name, caplog
):
    path = run / "model" / name
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"e", b"\xff", 1))
    assert f"{path} is not the one of the import. Put it back: cp " in train(own_source, run, 5)
    path.unlink()
    (own_source / "model" / name).rename(own_source / name)
    assert f"{path} is missing. Put the {name} of the import back" in train(own_source, run, 5)
    (own_source / name).rename(own_source / "model" / name)
    assert call("generate", run, "--prompt", "the").exit_code == 0
    assert f"note: {path} was missing: it was copied again from {own_source / 'model'}" in caplog.messages
    assert path.read_bytes() == whole


def test_a_tokenizer_file_that_was_not_there_is_refused(own_source, run):
    (run / "model" / "added_tokens.json").write_text('{"the": 5}')
    assert "added_tokens.json was not there at the import" in train(own_source, run, 5)


def test_what_a_person_may_change_is_told_and_used(own_source, run, whole, caplog):
    own = run / "model" / "generation_config.json"
    edited(own, temperature=0.5)
    assert call("generate", run, "--prompt", "the").exit_code == 0
    assert f"note: {own} is not the one of the import: it is used as it is now" in caplog.messages
    train(own_source, run, 0)
    check_equals(run, whole)


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"eos_token_id": \xff}'])
def test_a_damaged_file_that_can_be_done_without_is_one_sentence(own_source, run, tmp_path, content):
    own = run / "model" / "generation_config.json"
    own.write_bytes(content)
    for arguments in (("generate", run, "--prompt", "the"), ("export", run, tmp_path / "out")):
        assert f"{own} is damaged: it holds no JSON object" in told(call(*arguments), 5)
    own.unlink()
    (own_source / "model" / own.name).unlink()
    assert call("generate", run, "--prompt", "the").exit_code == 0, "the advice: do without it"


@pytest.mark.parametrize("name", ["../planted", "../../planted", "a/planted", ".."])
def test_a_file_of_a_run_cannot_lie_elsewhere(run, tmp_path, name):
    """A run of somebody else's could have had a file of his written wherever there was none."""
    info = json.loads((run / "run.json").read_text())
    source = tmp_path / "a" / "b" / "c"
    planted = source / name
    source.mkdir(parents=True)
    if name != "..":
        planted.parent.mkdir(exist_ok=True)
        planted.write_text("mine")
    files = {**info["files"], name: [hashlib.sha256(b"mine").hexdigest()]}
    edited(run / "run.json", files=files, source=str(source))
    before = {path for path in tmp_path.rglob("*") if path.name == "planted"}
    assert call("generate", run, "--prompt", "the").exit_code == 0, "the store says what run.json should"
    assert {path for path in tmp_path.rglob("*") if path.name == "planted"} == before


def test_a_link_in_the_place_of_the_models_folder_is_not_written_through(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (run / "model").rename(elsewhere)
    (run / "model").symlink_to(elsewhere)
    assert call("generate", run, "--prompt", "the").exit_code == 0
    (elsewhere / "tokenizer.json").unlink()
    told_of = told(call("generate", run, "--prompt", "the"), 5)
    assert f"{run / 'model'} is a link to {elsewhere}, and nothing is written there" in told_of
    assert not (elsewhere / "tokenizer.json").exists()
    (run / "model").unlink()
    elsewhere.rename(run / "model")
    assert call("generate", run, "--prompt", "the").exit_code == 0, "the advice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "somebody/kernel:run"}, "model_options.attn_implementation of run.json"),
        ({"block_list": 5}, "model_options.block_list of run.json"),
        ({"miniature": [5]}, "model_options.miniature of run.json"),
        ({"modules": {"path": 5, "sha256": "0"}}, "model_options.modules.path of run.json"),
        ({"modules": {"path": "a\0b", "sha256": "0"}}, "model_options.modules.path of run.json"),
        ({"modules": {"path": "a"}}, "model_options.modules of run.json"),
        ({"trust": True}, "model_options of run.json cannot be read: it has trust"),
    ],
)
def test_options_that_no_import_writes_are_refused(run, tmp_path, options, message):
    """One of them names code that transformers would fetch and run."""
    edited(run / "run.json", model_options=options)
    for arguments in (("generate", run, "--prompt", "the"), ("export", run, tmp_path / "out")):
        assert message in told(call(*arguments), 2)


def test_status_says_what_the_next_command_would_refuse(run):
    def files():
        status = call("status", run, "--json")
        assert status.exit_code == 0, status.stderr
        return json.loads(status.stdout)["files"]

    assert files() == []
    edited(run / "model" / "generation_config.json", temperature=0.5)
    assert files() == [], "it may be changed"
    edited(run / "model" / "config.json", rms_norm_eps=1.1e-6)
    (run / "model" / "tokenizer_config.json").unlink()
    (run / "model" / "added_tokens.json").write_text('{"the": 5}')
    said = "\n".join(files())
    assert "rms_norm_eps is 1.1e-06" in said
    assert f"{run / 'model' / 'tokenizer_config.json'} is missing: the next start copies it again" in said
    assert "added_tokens.json was not there at the import" in said
    assert len(files()) == 3
    assert not (run / "model" / "tokenizer_config.json").exists()
    assert said.splitlines()[0] in call("status", run).stdout


def test_a_template_of_the_data_is_bound_to_the_run(source, tmp_path):
    """Choosing one rewrites the tokenizer of the run: it must not be taken for a damaged one."""
    rows = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox"}]}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configured(source, tmp_path / "run", max_steps=2)
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
    data = config.data.model_copy(
        update={
            "train": [str(tmp_path / "rows.jsonl")], "eval": None, "chat_template": template,
            "assistant_only_loss": False,
        }
    )  # fmt: skip
    start(config.model_copy(update={"data": data}))
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == template
    assert call("generate", tmp_path / "run", "--chat", "--prompt", "the").exit_code == 0
    path = tmp_path / "run" / "model" / "tokenizer_config.json"
    edited(path, model_max_length=7)
    assert "is not the one of the import" in told(call("generate", tmp_path / "run", "--prompt", "the"), 5)


# -------------------------------------------------------------------------------------------- run.json


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 7}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_run_json_is_read_from_the_store(stopped, content):
    before = RunFolder(stopped).read()
    (stopped / "run.json").write_bytes(content)
    assert RunFolder(stopped).read() == before


@pytest.mark.parametrize("content", [None, b"{"])
def test_a_lost_run_json_is_made_anew_from_the_store(source, stopped, whole, content):
    """A power cut just after the import could take it, and then the whole store was called no run."""
    before = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").unlink()
    if content is not None:
        (stopped / "run.json").write_bytes(content)
    assert json.loads(call("status", stopped, "--json").stdout)["step"] == 3
    _, reporter = start(configured(source, stopped), resume=True)
    note = (
        "run.json is " + ("not there" if content is None else "damaged") + ": it was made anew from the store"
    )
    assert note in "\n".join(reporter.starts[0][2])
    assert json.loads((stopped / "run.json").read_text()) == before
    check_equals(stopped, whole)


def test_a_lost_run_json_is_made_anew_from_a_store_elsewhere(source, tmp_path):
    config = configured(source, tmp_path / "run", max_steps=2, memory={"store_dir": [tmp_path / "fast"]})
    start(config)
    before = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    assert "done all its 2 steps" in told(call("train", "--config", tmp_path / "my.yaml", "--resume"), 2)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == before


def test_a_lost_run_json_does_not_make_the_chat_template_of_the_data_a_stranger(source, tmp_path):
    """Training had written it into the tokenizer, and only run.json knew: every command refused it."""
    config = configured(source, tmp_path / "run", max_steps=2)
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": "chatml"})})
    start(config)
    before = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    assert "done all its 2 steps" in told(call("train", "--config", tmp_path / "my.yaml", "--resume"), 2)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == before
    assert call("generate", tmp_path / "run", "--prompt", "the").exit_code == 0


def test_a_store_without_a_record_of_its_import_is_left_alone(stopped, tmp_path):
    """What cannot be made anew is told, with no advice that could cost a training."""
    run = tmp_path / "other"
    run.mkdir()
    (stopped / "store.mtio").rename(run / "store.mtio")
    (run / "run.json").write_text("{")
    assert json.loads(call("status", run, "--json").stdout)["step"] == 3, "it says whose it is by itself"
    (run / "store.mtio").write_bytes(b"x" * 5000)
    line = told(call("generate", run, "--prompt", "the"), 2)
    assert "run.json is damaged" in line
    assert "remove" not in line.lower()


def test_a_model_folder_that_a_power_cut_left_unnamed_gets_its_name(source, stopped, whole):
    (stopped / "model").rename(stopped / "model.partial")
    assert "nothing to remove" in call("clean", stopped).stdout
    start(configured(source, stopped), resume=True)
    check_equals(stopped, whole)


def test_the_lock_of_an_import_that_was_killed_at_its_end_is_removed(stopped):
    lock = stopped / "import.lock"
    with RunFolder(stopped).importing():
        assert RunFolder(stopped).mend([]) == []
        assert lock.exists(), "it is held"
    lock.touch()
    assert RunFolder(stopped).mend([]) == []
    assert not lock.exists()


def test_two_runs_of_one_name_in_one_store_folder_are_told_apart(source, tmp_path):
    """The second was told to remove the store of the first."""
    memory = {"store_dir": [tmp_path / "fast"]}
    start(configured(source, tmp_path / "one" / "run", max_steps=2, memory=memory))
    config = configured(source, tmp_path / "two" / "run", memory=memory)
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    for result in (
        call("train", "--config", tmp_path / "my.yaml"),
        call("import", source / "model", tmp_path / "two" / "run", "--store-dir", tmp_path / "fast"),
    ):
        line = told(result, 2)
        assert f"it is the store of the run {tmp_path / 'one' / 'run'}, at step 2" in line
        assert "remove" not in line.lower()
    cleaned = told(
        call("clean", tmp_path / "two" / "run", "--store-dir", tmp_path / "fast", "--store", "--yes"), 4
    )
    assert f"store of the run {tmp_path / 'one' / 'run'}, at step 2" in cleaned
    assert (tmp_path / "fast" / "run.mtio").exists()
    # As the message says.
    (tmp_path / "my.yaml").write_text(
        config.model_copy(update={"output_dir": tmp_path / "two" / "second"}).to_yaml()
    )
    assert call("train", "--config", tmp_path / "my.yaml", "max_steps=1").exit_code == 0


# -------------------------------------------------------------------------------------- metrics and the rest


def test_a_damaged_line_of_the_metrics_costs_that_line_alone(source, stopped, whole):
    """The first damaged line took all that followed, or ended the run with a traceback."""
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b'"step": 2', b'"step": "2"'), lines[2]]) + b"\n")
    assert "step 3" in call("status", stopped).stdout
    _, reporter = start(configured(source, stopped), resume=True)
    assert f"note: {path}" not in str(reporter.starts)
    assert f"{path}: line 2 was damaged and left out" in "\n".join(reporter.starts[0][2])
    assert [line["step"] for line in metrics_of(stopped)] == [1, 3, 4, 5]
    assert figures(stopped) == [figures(whole[0])[index] for index in (0, 2, 3, 4)]


def test_the_line_that_a_power_cut_took_is_made_anew(source, stopped, whole):
    """A later step was acknowledged, and its line was missing for good."""
    path = stopped / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    _, reporter = start(configured(source, stopped), resume=True)
    assert "the line of step 3 was missing, and was made anew" in "\n".join(reporter.starts[0][2])
    lines = metrics_of(stopped)
    assert [(line["step"], line["loss"]) for line in lines] == [
        (n, loss) for n, _, loss, *_ in figures(whole[0])
    ]
    assert lines[2]["made_anew"]
    assert lines[2]["seconds"] is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 9,
        b"[]\n",
        b"{}\n",
        b'{"step": true}\n',
        b'{"step": -1}\n',
        b'{"step": 1e3}\n',
        b"[" * 100_000,
    ],
)
def test_metrics_that_are_no_metrics_are_made_anew(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert last_report(path) is None
    MetricsFile(path, TrainerState(step=4, loss=2.5)).close()
    (line,) = path.read_text().splitlines()
    assert (json.loads(line)["step"], json.loads(line)["loss"]) == (4, 2.5)


def test_the_configuration_of_the_last_start_is_no_hindrance(source, stopped, whole):
    (stopped / "config.yaml").write_bytes(b"\xff: [")
    train(source, stopped, 0)
    check_equals(stopped, whole)


@pytest.mark.parametrize("name", ["index.json", "train.tokens"])
def test_damaged_tokens_are_made_anew(source, stopped, whole, name):
    path = stopped / "data" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    train(source, stopped, 0)
    check_equals(stopped, whole)


def test_paths_of_a_run_are_kept_where_they_do_not_depend_on_the_folder(stopped):
    info = json.loads((stopped / "run.json").read_text())
    assert Path(info["source"]).is_absolute()
    assert info["stores"] == ["store.mtio"], "relative to the run, which may be moved"


@pytest.mark.parametrize("where", ["/proc/megatrain", "/sys/megatrain"])
def test_a_store_in_the_kernels_own_file_systems_is_refused_before_anything_is_written(
    source, tmp_path, where
):
    line = told(call("import", source / "model", tmp_path / "run", "--store-dir", where), 4)
    assert f"{where}/run.mtio would lie on " in line
    assert "Choose a folder on a local drive" in line
    assert not (tmp_path / "run").exists()
    assert "would lie on" in told(call("import", source / "model", f"{where}/run"), 4)


def test_a_store_in_ram_is_told_before_the_import(source, tmp_path, caplog):
    folder = Path("/dev/shm")  # noqa: S108 - the point
    if not (folder.is_dir() and os.access(folder, os.W_OK) and drive_kind(folder) == "tmpfs"):
        pytest.skip("there is no tmpfs at /dev/shm here")
    store = folder / f"megatrain-test-{os.getpid()}"
    try:
        assert call("import", source / "model", tmp_path / "run", "--store-dir", store).exit_code == 0
        assert "that is RAM, no step survives a power cut" in "\n".join(caplog.messages)
    finally:
        shutil.rmtree(store, ignore_errors=True)


def drive_kind(folder):
    return mount_of(folder.resolve(), read_mounts()).kind
