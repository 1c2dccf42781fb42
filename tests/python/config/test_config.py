"""The configuration: what is taken, what is refused, and the words in which it is refused."""

import math
from pathlib import Path

import pytest
import yaml

from megatrain_io.config.parse import describe_keys, load
from megatrain_io.config.schema import RunConfig
from megatrain_io.errors import ConfigError
from megatrain_io.runs.folder import RunFolder

MINIMAL = ["model=m", "output_dir=runs/x", "data.train=a.jsonl"]
FILE = """\
model: ./Qwen3-8B
output_dir: runs/contracts
data:
  train: [a.jsonl, b/]
  eval: 0.02
train:
  learning_rate: 1.0e-5
"""


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file and gives its path."""

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path, *overrides):
    """The lines of the error."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


TEMPLATE = "must be a name, a file or the text of a chat template, or null for the model's own"
LONG = "must be a path, of 4095 bytes at most with names of 255 bytes at most: here one has"


def problem(*overrides):
    """The one problem with these overrides on top of a sound minimum."""
    (line,) = problems(None, *MINIMAL, *overrides)
    return line.removeprefix("the configuration: ")


# -------------------------------------------------------------------------------------- what is taken


def test_a_file_with_defaults(write):
    config, notes = load(write(FILE), [])
    assert notes == []
    assert config.model == Path("Qwen3-8B")
    assert config.data.train == ["a.jsonl", "b"]
    assert config.data.eval == 0.02
    assert config.data.max_length == 1024
    assert config.train.learning_rate == 1e-5
    assert config.train.gradient_accumulation_steps == 8
    assert config.memory.io_backend == "auto"


def test_everything_can_come_from_the_command_line():
    config, notes = load(None, MINIMAL)
    assert config.data.train == ["a.jsonl"]
    assert notes == []


def test_the_command_line_wins(write):
    path = write(FILE)
    config, notes = load(
        path, ["train.learning_rate=2e-5", "data.eval=null", "max_length=64", "seed=1", "seed=2"]
    )
    assert (config.train.learning_rate, config.data.eval, config.data.max_length) == (2e-5, None, 64)
    assert config.train.seed == 2
    assert notes == []


def test_a_bad_value_in_the_file_that_is_overridden_is_forgiven(write):
    config, _ = load(write(FILE.replace("1.0e-5", "fast")), ["learning_rate=3e-5"])
    assert config.train.learning_rate == 3e-5


def test_it_survives_its_own_yaml(write):
    config, _ = load(
        None,
        [*MINIMAL, "learning_rate=3e-7", "data.fields={prompt: q}", "memory.store_dir=/nvme", "eval=x y"],
    )
    assert load(write(config.to_yaml()), []) == (config, [])


def test_names_of_other_tools_are_taken_with_a_note(write):
    text = FILE.replace("model:", "model_name_or_path:").replace("  eval: 0.02", "  cutoff_len: 99")
    config, notes = load(write(text), ["data.max_seq_length=77"])
    assert config.model == Path("Qwen3-8B")
    assert config.data.max_length == 77
    assert notes == [
        "model_name_or_path: taken as model (line 1)",
        "data.cutoff_len: taken as data.max_length (line 5)",
        "data.max_seq_length: taken as data.max_length (on the command line)",
    ]


def test_empty_sections_are_sections(write):
    assert load(write(FILE + "memory:\n"), [])[0].memory.threads == 0


def test_fields_can_be_given_one_by_one(write):
    path = write(FILE.replace("  eval: 0.02", "  fields: {prompt: question}"))
    assert load(path, ["data.fields.completion=answer", "fields.prompt=ask"])[0].data.fields == {
        "prompt": "ask",
        "completion": "answer",
    }


def test_home_is_understood(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    asked = [
        "model=~/m",
        "output_dir=o",
        "data.train=~/a",
        "memory.store_dir=~/mt",
        "chat_template=~/t.jinja",
    ]
    config, _ = load(None, asked)
    assert config.data.chat_template == "/home/ada/t.jinja"
    assert config.model == Path("/home/ada/m")
    assert config.data.train == ["/home/ada/a"]
    assert config.memory.store_dir == (Path("/home/ada/mt"),)


def test_whole_epochs_may_be_written_as_other_tools_do():
    epochs = load(None, [*MINIMAL, "num_train_epochs=3.0"])[0].train.num_train_epochs
    assert epochs == 3
    assert isinstance(epochs, int)
    assert "valid integer" in problem("num_train_epochs=0.5")


@pytest.mark.parametrize(
    ("written", "number", "better"),
    [("1e-5", 1e-5, "1.0e-5"), ("2E-5", 2e-5, "2.0e-5"), ("1.5e3", 1500, "1.5e+3"), ("+.1e1", 1, "+0.1e+1")],
)
def test_numbers_that_yaml_reads_as_text(write, written, number, better):
    assert isinstance(yaml.safe_load(written), str)
    config, notes = load(write(FILE.replace("1.0e-5", written)), [])
    assert config.train.learning_rate == number
    (note,) = notes
    assert note == (
        f"train.learning_rate: {written} was read as text by YAML 1.1; taken as {number} (line 7). "
        f"Write {better} to silence this"
    )
    assert yaml.safe_load(better) == number


def test_a_folder_with_the_name_of_a_number_stays_a_folder():
    assert load(None, [*MINIMAL, "output_dir=1e5"])[0].output_dir == Path("1e5")


def test_a_note_on_epochs_that_are_not_used():
    assert load(None, [*MINIMAL, "max_steps=5", "num_train_epochs=2"])[1] == [
        "train.num_train_epochs: not used, because max_steps is given"
    ]


def test_every_key_has_a_description():
    lines = describe_keys().splitlines()
    keys = {line.split()[0]: line for line in lines}
    config = load(None, MINIMAL)[0].model_dump()
    flat = {
        f"{name}.{leaf}" if isinstance(value, dict) else name
        for name, value in config.items()
        for leaf in (value if isinstance(value, dict) else [""])
    }
    assert keys.keys() == flat
    assert not [line for line in lines if line.endswith("None")]


def test_the_store_of_a_run_has_a_file_on_each_drive(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    run = RunFolder(Path("runs/x"))
    assert run.stores_in(None) == [Path("runs/x/store.mtio")]
    assert run.stores_in([Path("/nvme")]) == [Path("/nvme/x.mtio")]
    config, _ = load(None, [*MINIMAL, "memory.store_dir=[/a, ~/b, /a]"])
    names = ["/a/x.mtio", "/home/ada/b/x.1.mtio", "/a/x.2.mtio"]
    assert run.stores_in(config.memory.store_dir) == [Path(name) for name in names]


# ------------------------------------------------------------------------------------ what is refused


def test_a_misspelt_key_with_its_line(write):
    path = write(FILE.replace("learning_rate", "learning_rat"))
    assert problems(path) == [
        f"{path}: train.learning_rat: unknown key (line 7). Did you mean learning_rate?"
    ]


def test_all_problems_at_once_in_the_order_of_the_file(write):
    path = write("modle: m\ndata: {packing: maybe}\ntrain:\n  learning_rat: 1\n  warmup_steps: -3\n")
    assert problems(path, "seed=-1") == [
        f"{path}: 7 problems",
        "  train.seed: must be greater than or equal to 0, and is -1 (on the command line)",
        "  modle: unknown key (line 1). Did you mean model?",
        "  data.packing: must be a valid boolean, and is maybe (line 2)",
        "  train.learning_rat: unknown key (line 4). Did you mean learning_rate?",
        "  train.warmup_steps: must be greater than or equal to 0, and is -3 (line 5)",
        "  output_dir: required; give it in the file, or output_dir=... on the command line",
        "  data.train: required; give it in the file, or data.train=... on the command line",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "learning_rat=1",
            "learning_rat: unknown key (on the command line). Did you mean train.learning_rate?",
        ),
        (
            "data.learning_rate=1",
            "data.learning_rate: unknown key (on the command line). Did you mean train.learning_rate?",
        ),
        ("trian.seed=1", "trian.seed: unknown key (on the command line). Did you mean train?"),
        ("model.x=1", "model.x: unknown key (on the command line). Did you mean model?"),
        (
            "memory.xyzzy=1",
            (
                "memory.xyzzy: unknown key (on the command line). Known here: store_dir, durability, "
                "commit_every, ram, vram, max_tbw, io_backend, threads"
            ),
        ),
        ("train=a.jsonl", "train: a section, not a key (on the command line). Did you mean data.train?"),
        ("data=a.jsonl", "data: a section, not a key (on the command line)"),
        ("a.jsonl", "a.jsonl: not key=value (on the command line)"),
        ("=1", "=1: not key=value (on the command line)"),
    ],
)
def test_keys_on_the_command_line(override, message):
    assert problem(override) == message


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("max_norm", "use train.max_grad_norm"),
        ("train.optim", "AdamW is the only optimizer so far; remove it"),
        ("lora", "not available yet; remove it"),
        ("method", "not available yet: all parameters are trained; remove it"),
        ("report_to", "not available yet; remove it"),
        ("train.save_steps", "every step is durable here; nothing to set; remove it"),
        ("bf16", "use precision (train.precision: bf16 or fp32)"),
        ("fp16", "use precision (train.precision: bf16 or fp32)"),
        ("train.gradient_checkpointing", "always on here; remove it"),
        ("deepspeed", "not used here: the model is paged through NVMe instead; remove it"),
        ("micro_batch_size", "use train.per_device_train_batch_size"),
        ("trust_remote_code", "code from a model folder is never run; remove it"),
    ],
)
def test_keys_of_other_tools_get_a_sentence_of_their_own(key, sentence):
    assert problem(f"{key}=1") == f"{key}: {sentence} (on the command line)"


def test_sections_of_other_tools_too(write):
    path = write(FILE + "lora:\n  r: 16\n")
    assert problems(path) == [f"{path}: lora: not available yet; remove it (line 8)"]
    assert problem("lora.r=16") == "lora: not available yet; remove it (on the command line)"


@pytest.mark.parametrize(
    ("override", "must"),
    [
        ("learning_rate=.nan", "must be a finite number, and is nan"),
        ("learning_rate=.inf", "must be a finite number, and is inf"),
        ("learning_rate=1e999", "must be a finite number, and is inf"),
        ("learning_rate=fast", "must be a valid number, and is fast"),
        ("learning_rate=true", "must be a valid number, and is true"),
        ("weight_decay=-0.1", "must be greater than or equal to 0, and is -0.1"),
        ("adam_beta1=1", "must be less than 1, and is 1"),
        ("adam_beta2=-0.5", "must be greater than or equal to 0, and is -0.5"),
        ("adam_epsilon=0", "must be at least 1.2e-38, the smallest normal number of fp32, and is 0"),
        ("adam_epsilon=1e-50", "must be at least 1.2e-38, the smallest normal number of fp32, and is 1e-50"),
        ("max_length=1", "must be greater than or equal to 2, and is 1"),
        ("max_length=12.5", "must be a valid integer, and is 12.5"),
        ("max_length='12'", "must be a valid integer, and is '12'"),
        ("max_steps=0", "must be greater than or equal to 1, and is 0"),
        ("commit_every=0", "must be greater than or equal to 1, and is 0"),
        ("commit_every=null", "must be a valid integer, and is null"),
        ("logging_steps=true", "must be a valid integer, and is true"),
        (
            "per_device_train_batch_size=10000000000",
            "must be less than or equal to 2147483647, and is 10000000000",
        ),
        ("precision=fp16", "must be 'auto', 'bf16' or 'fp32', and is fp16"),
        ("lr_scheduler_type=cos", "must be 'cosine', 'linear' or 'constant', and is cos"),
        ("io_backend=libaio", "must be 'auto', 'uring' or 'threads', and is libaio"),
        ("packing=1", "must be a valid boolean, and is 1"),
        ("data.eval=1.5", "must be a fraction between 0 and 1, or a path, or null, and is 1.5"),
        ("data.eval=0", "must be a fraction between 0 and 1, or a path, or null, and is 0"),
        ("data.train=[]", "must be a path, or a list of paths, and is []"),
        ("data.train=[a, 3]", "must be a path, or a list of paths, and is ['a', 3]"),
        ("data.train=7", "must be a path, or a list of paths, and is 7"),
        ("model=", "must be a path, as text, and is null"),
        ("model=''", "must be a path, as text, and is ''"),
        ("memory.store_dir=3", "must be a path, as text, and is 3"),
        ("memory.store_dir=[]", "must be a path, or a list of paths, and is []"),
        ("data.fields={a: 2}", "must be a valid string, and is {'a': 2}"),
        ("ram=1e-5", "must be a size, such as 4GiB, and is '1e-5'"),  # was taken for 1 EB
        ("ram=5", "must be a size with its unit, such as 4GiB: without one it is bytes, and is 5"),
        ("vram='16'", "must be a size with its unit, such as 4GiB: without one it is bytes, and is '16'"),
        ("ram=1e3GiB", "must be a size, such as 4GiB, and is '1e3GiB'"),
        ("ram=99999999999TiB", "must be a size, such as 4GiB, and is '99999999999TiB'"),
        ("adam_epsilon=0.5", "must be less than or equal to 0.01, and is 0.5"),
        ("chat_template=''", f"{TEMPLATE}, and is ''"),
        ("chat_template=7", f"{TEMPLATE}, and is 7"),
        (
            'data.train="a\\0b"',
            "must be a path: it has a NUL character, which no file name has, and is 'a\\x00b'",
        ),
        (
            'model="a\\uD800"',
            "must be a path: it has half of a pair of characters, which no file name has, and is 'a\\ud800'",
        ),
        (f"output_dir={'a' * 300}", f"{LONG} 300, and is 'aaaaaaaaaaaa...aaaaaaaaaaaaa'"),
        (f"store_dir=[x, {'b' * 300}/y]", f"{LONG} 300, and is ['x', 'bbbbbbbbbbbb...bbbbbbbbbbb/y']"),
    ],
)
def test_values(override, must):
    message = problem(override)
    key = override.partition("=")[0].rpartition(".")[2]
    assert message.partition(": ")[0].rpartition(".")[2] == key
    assert message.partition(": ")[2] == f"{must} (on the command line)"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["eval_steps=5"],
            "train.eval_steps: there is nothing to evaluate: give data.eval, or remove eval_steps",
        ),
        (
            ["warmup_steps=9", "max_steps=5"],
            "train.warmup_steps: 9 steps of warm-up are more than the whole run (max_steps is 5)",
        ),
    ],
)
def test_values_that_contradict_each_other(overrides, message):
    assert problem(*overrides) == message


def test_a_key_given_twice(write):
    path = write(FILE + "  learning_rate: 2.0e-5\n")
    assert problems(path) == [f"{path}: train.learning_rate: given twice, also in line 7; keep one (line 8)"]
    path = write(FILE.replace("  eval: 0.02", "  max_length: 8\n  sequence_len: 9"))
    assert problems(path) == [f"{path}: data.max_length: given twice, also in line 5; keep one (line 6)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold keys and values, such as `model: ./Qwen3-8B`"),
        ("model: [\n", "not YAML: expected the node content, but found '<stream end>' (line 2, column 1)"),
        ("a: b: c\n", "not YAML: mapping values are not allowed here (line 1, column 5)"),
        ("model: !!python/object:os.system x\n", None),
        ("model: a\n---\nmodel: b\n", None),
        ("model: \x01\n", None),
    ],
)
def test_files_that_are_no_configuration(write, text, message):
    path = write(text)
    lines = problems(path)
    assert lines == [f"{path}: {message}"] if message else sum("not YAML: " in line for line in lines) == 1


def test_an_empty_file_lacks_what_is_required(write):
    assert len(problems(write(""))) == 4


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("2024-13-45", "month must be in 1..12"),
        ("0b_", "invalid literal for int"),
        ("9" * 5000, "a number has more digits than are read"),
        ("[" * 3000, "it is nested too deeply"),
        ("{a: " * 3000, "it is nested too deeply"),
        ("!!timestamp x", "it is not what its tag says"),
        ("!!float x", "could not convert"),
        ("!!binary x", "failed to decode base64"),
        ("!!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_what_pyyaml_stumbles_over_is_one_sentence(write, written, problem):
    """They ended in tracebacks of datetime, of int and of the parser."""
    with pytest.raises(ConfigError, match=problem) as caught:
        load(None, [*MINIMAL, f"learning_rate={written}"])
    assert "learning_rate: the value is not YAML: " in str(caught.value)
    (line,) = problems(
        write(f"model: m\noutput_dir: o\ndata: {{train: a}}\ntrain:\n  learning_rate: {written}\n")
    )
    assert "not YAML: " in line
    assert problem in line


def test_a_bomb_of_aliases_is_refused_without_being_unfolded(write):
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
    assert len("".join(problems(write(f"a0: &a0 [lol]\n{levels}\nmodel: *a29\n")))) < 10_000


def test_files_that_are_not_there(tmp_path):
    assert problems(tmp_path / "no.yaml") == [
        f"{tmp_path}/no.yaml: cannot be read: No such file or directory"
    ]
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: it is a folder, and a regular file is needed"]


def test_a_section_that_is_a_value(write):
    path = write("data: a.jsonl\nmodel: m\noutput_dir: o\n")
    assert problems(path) == [
        f"{path}: 2 problems",
        "  data: must hold keys beneath it (line 1)",
        "  data.train: required; give it in the file, or data.train=... on the command line",
    ]


def test_long_values_are_shown_shortened():
    assert len(problem(f"precision={'x ' * 500}y")) < 200


def test_the_models_are_strict_by_themselves():
    sound = load(None, MINIMAL)[0].model_dump()
    sound["data"]["max_length"] = math.inf
    with pytest.raises(ValueError, match="valid integer"):
        RunConfig.model_validate(sound)
