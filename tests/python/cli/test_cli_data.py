"""Data by the command line: what is trained, asked and exported, and what is said of it."""

import json
import os
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from corpus import EOS, TEMPLATE, TURNS, make_tokenizer, write
from megatrain_io.cli.app import app
from megatrain_io.data import chat_templates
from megatrain_io.errors import DataError
from reference.reference import build, tiny_config

LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="megatrain-io")


def make_model(folder, *, vocabulary=263, **tokenizer):
    """A small model as it lies on the hub: eos in both of its configurations."""
    made = make_tokenizer(**tokenizer)
    config = tiny_config("llama", tied=True, num_hidden_layers=2, vocab_size=vocabulary)
    config.eos_token_id, config.bos_token_id = made.eos_token_id, None
    model = build(config, seed=1)
    model.generation_config.eos_token_id = made.eos_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model: no chat template."""
    return make_model(tmp_path_factory.mktemp("base") / "model", template=None)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model with a chat template."""
    return make_model(tmp_path_factory.mktemp("chat") / "model")


def train(model, data, run, *more, steps=1):
    settings = {
        "model": model, "output_dir": run, "data.train": data, "train.max_steps": steps, "train.precision": "fp32",
        "train.gradient_accumulation_steps": 1, "data.max_length": 64, "memory.io_backend": "threads",
    }  # fmt: skip
    return call("train", *(f"{key}={value}" for key, value in settings.items()), *more)


def said(result):
    """What was told, without the breaks of lines."""
    return " ".join(result.stderr.split())


# ------------------------------------------------------------------------------------- what ends an answer


def test_what_ends_a_trained_answer_ends_generation_here_and_from_the_export(tmp_path, base):
    """Both ran on to the limit, because eos was another token than the one that the template puts behind answers."""
    data = write(tmp_path / "a.jsonl", [{"messages": TURNS[:2]}])
    result = train(
        base, data, tmp_path / "run", "data.chat_template=chatml", "learning_rate=2e-2", "lr_scheduler_type=constant",
        steps=40,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = call("generate", tmp_path / "run", "--chat", "--prompt", "Hi", "--max-new-tokens", 20)
    assert answer.stdout.strip() == "Yo", "and nothing after it"
    assert call("export", tmp_path / "run", tmp_path / "out").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ends = tokenizer.convert_tokens_to_ids([EOS, "<|im_end|>"])
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == ends
    prompt = tokenizer.apply_chat_template(
        TURNS[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(made) == "Yo<|im_end|>"
    # The file that says so may be lost: the copy from the source does not know it, the store does.
    (tmp_path / "run" / "model" / "generation_config.json").unlink()
    answer = call("generate", tmp_path / "run", "--chat", "--prompt", "Hi", "--max-new-tokens", 20)
    assert answer.stdout.strip() == "Yo"
    assert call("export", tmp_path / "run", tmp_path / "again").exit_code == 0
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_model_without_generation_config_gets_one_that_ends_its_answers(tmp_path, base):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    data = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    assert train(tmp_path / "model", data, tmp_path / "run", "data.chat_template=chatml").exit_code == 0
    content = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert content == {"eos_token_id": make_tokenizer().convert_tokens_to_ids([EOS, "<|im_end|>"])}


def test_nothing_is_changed_where_answers_end_with_eos(tmp_path, base):
    data = write(tmp_path / "a.jsonl", [{"text": "One two three"}])
    assert train(base, data, tmp_path / "run").exit_code == 0
    assert (tmp_path / "run/model/generation_config.json").read_bytes() == (
        base / "generation_config.json"
    ).read_bytes()


# ------------------------------------------------------------------------------------ asked as it was trained


@pytest.mark.parametrize(
    ("rows", "template", "plain", "chatting"),
    [
        ([{"prompt": "Hi", "completion": "Yo"}], TEMPLATE, "", "without the chat template: leave --chat out"),
        ([{"messages": TURNS}], TEMPLATE, "answers in the chat template: ask with --chat", ""),
        ([{"instruction": "Hi", "output": "Yo"}], None, "ask with '### Instruction:', a new line", None),
        ([{"text": "Hi there"}], TEMPLATE, "", ""),
    ],
    ids=["prompts", "messages", "headings", "text"],
)
def test_asking_otherwise_than_was_trained_is_told(tmp_path, base, chat, rows, template, plain, chatting):
    data = write(tmp_path / "a.jsonl", rows)
    assert train(chat if template else base, data, tmp_path / "run").exit_code == 0
    for note, flags in ((plain, []), (chatting, ["--chat"])):
        if note is None:
            continue
        result = call("generate", tmp_path / "run", "--prompt", "Hi", "--max-new-tokens", 1, *flags)
        assert result.exit_code == 0, result.output
        assert ("note: this run was trained" in said(result)) == bool(note)
        assert note in said(result)


def test_prompts_beside_a_template_are_told_of_at_the_start(tmp_path, chat):
    data = write(tmp_path / "a.csv", "question;answer\nHi;Yo\n")
    result = train(chat, data, tmp_path / "run", "data.fields={prompt: question, completion: answer}")
    assert result.exit_code == 0
    fields = "{instruction: question, output: answer}"
    assert f"set data.fields: {fields}" in said(result)
    result = train(chat, data, tmp_path / "other", f"data.fields={fields}")
    assert "<|im_start|>user" in result.stderr
    assert "as they stand" not in said(result)


def test_bos_is_put_once_when_a_prompt_has_it(tmp_path):
    """Two were put, here as in training: the model had never met that."""
    model = make_model(tmp_path / "model", template=None, bos=True)
    data = write(tmp_path / "a.jsonl", [{"text": "<s>One two"}])
    result = train(model, data, tmp_path / "run", "learning_rate=2e-2", steps=3)
    assert "| <s>{+One two" in result.stderr
    texts = [
        call("generate", tmp_path / "run", "--prompt", prompt, "--max-new-tokens", 9).stdout
        for prompt in ("One", "<s>One")
    ]
    assert texts[0] == texts[1]


# --------------------------------------------------------------------------------- what is not read, no file


def test_what_is_not_read_is_told_first_and_by_the_plan(tmp_path, base):
    folder = tmp_path / "contracts"
    for i in range(3):
        write(folder / f"{i}.txt", "words " * 9)
        write(folder / f"{i}.docx", b"PK" * 60)
    line = f"3 of 6 files in {folder} are not read (69 % of its bytes, 360 bytes of 522 bytes): 3 .docx (0.docx, 1.docx"
    result = train(base, folder, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert said(result).startswith(f"note: {line}")
    planned = call("plan", base, f"data.train={folder}", "train.precision=fp32", "--json")
    assert any(note.startswith(line) for note in json.loads(planned.stdout)["notes"])
    planned = call("plan", base, "train.precision=fp32", "--json")
    assert not any("not read" in note for note in json.loads(planned.stdout)["notes"])


def test_a_pipe_among_the_data_hangs_nothing(tmp_path, base):
    write(tmp_path / "in" / "a.txt", "words " * 9)
    os.mkfifo(tmp_path / "in" / "b.txt")
    result = train(base, tmp_path / "in", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "b.txt was skipped: it is a named pipe, not a file" in said(result)
    result = train(base, tmp_path / "in" / "b.txt", tmp_path / "other")
    assert result.exit_code == DataError.exit_code
    assert "b.txt is a named pipe: only files can be trained on" in said(result)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"text": ' + "[" * 3000 + "]" * 3000 + "}\n", "is nested more than 100 deep"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}\n", "Exceeds the limit (4300 digits)"),
        ('{"text": "\\ud800"}\n', "holds half a character"),
        ('{"te\\u0000xt": "a"}\n', "has keys ["),
        ('{"text": ""}\n', "nothing is left to train on"),
        ("[" * 3000 + "\n", "is nested more than 100 deep"),
    ],
    ids=["nested", "digits", "half a character", "a zero byte", "nothing", "brackets"],
)
def test_data_that_cannot_be_trained_end_with_a_sentence(tmp_path, base, content, error):
    result = train(base, write(tmp_path / "a.jsonl", content), tmp_path / "run")
    assert result.exit_code == DataError.exit_code, result.output
    assert error in said(result)
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "store.mtio").exists()


def test_a_zero_byte_in_a_text_is_trained_as_it_stands(tmp_path, base):
    result = train(base, write(tmp_path / "a.jsonl", [{"text": "One\0two"}]), tmp_path / "run")
    assert result.exit_code == 0, result.output


# ------------------------------------------------------------------------------------------ chat templates


def test_a_template_without_an_end_stops_neither_training_nor_asking(tmp_path, chat, monkeypatch):
    """Both hung for good."""
    monkeypatch.setattr(chat_templates, "_CPU_SECONDS", 0.3)
    data = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    template = write(tmp_path / "t.jinja", LOOPS)
    result = train(chat, data, tmp_path / "run", f"data.chat_template={template}")
    assert result.exit_code == DataError.exit_code, result.output
    assert "it takes more than 0.3 seconds of computing" in said(result)
    shutil.copytree(chat, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(LOOPS)
    assert call("import", tmp_path / "model", tmp_path / "run", "--precision", "fp32").exit_code == 0
    result = call("generate", tmp_path / "run", "--chat", "--prompt", "Hi")
    assert result.exit_code == DataError.exit_code, result.output
    assert "refuses the messages: it takes more than 0.3 seconds of computing" in said(result)


# ------------------------------------------------------------------------------------ padding, and no tokens


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_padding_is_a_token_that_the_model_has(tmp_path):
    """A padding token that was added without a row for it ended in an IndexError, after the import."""
    data = write(tmp_path / "a.jsonl", [{"text": "One"}, {"text": "One two three four"}] * 2)
    runs = []
    for name, pad in (("known", EOS), ("added", "<pad>")):
        tokenizer = make_tokenizer(template=None)
        model = make_model(tmp_path / name, vocabulary=len(tokenizer), template=None)
        if pad == "<pad>":
            tokenizer.add_special_tokens({"pad_token": pad})
            assert tokenizer.pad_token_id == len(tokenizer) - 1
            tokenizer.save_pretrained(model)
        more = ("train.per_device_train_batch_size=2", "data.packing=false")
        result = train(model, data, tmp_path / f"run-{name}", *more, steps=2)
        assert result.exit_code == 0, result.output
        runs.append(losses(tmp_path / f"run-{name}"))
    assert runs[0] == runs[1]


def test_a_text_of_which_no_token_is_made_is_dropped_with_a_note(tmp_path, base):
    """It ended in an IndexError."""
    shutil.copytree(base, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    path.write_text(json.dumps(content))
    data = write(
        tmp_path / "a.jsonl", [{"text": "\u200b\u200b"}, {"text": "\u200b" * 999}, {"text": "One two"}]
    )
    result = train(tmp_path / "model", data, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "2 examples had nothing to train" in said(result)
    assert len(losses(tmp_path / "run")) == 1
