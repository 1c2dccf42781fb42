"""Generation from a paged model gives the tokens that stock `generate` gives."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from corpus import TURNS, make_tokenizer
from megatrain_io.errors import ConfigError, DataError
from megatrain_io.generate import Generator, Pick, next_tokens
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.import_model import import_model
from reference.reference import build, tiny_config

ENGINE = "threads"  # stopping a ring takes a second; how bytes move is tested elsewhere
PROMPT = "The quick brown Pony"
NEW = 24


def make_source(folder, family="llama", tied=False, template=True, vocabulary=271, layers=3):
    config = tiny_config(family, tied, vocab_size=vocabulary, num_hidden_layers=layers)
    config.eos_token_id = config.bos_token_id = None
    model = build(config, seed=5)
    # Random weights as small as a model starts with say the same token over and over.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = make_tokenizer() if template else make_tokenizer(template=None)
    tokenizer.save_pretrained(folder)
    return folder


def bring_in(source, path, precision="bf16"):
    run = RunFolder(path)
    import_model(source, run, precision=precision, engine=ENGINE)
    return run


def stock(folder, prompt, dtype, stop=(), new=NEW):
    """Tokens of stock greedy generation, without the one that ended it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
        eos_token_id=list(stop) or None,
    )
    tokens = out[0, prompt.shape[1] :].tolist()
    return tokens[:-1] if tokens[-1] in stop else tokens


def paged(generator, prompt, new=NEW, stop=(), **how):
    following = next_tokens(generator._model, prompt, Pick(**how), frozenset(stop))
    tokens = []
    for token in following:
        tokens.append(token)
        if len(tokens) == new:
            break
    following.close()
    return tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_source(folder / "source")
    bring_in(folder / "source", folder / "run")
    return folder


@pytest.fixture
def generator(llama):
    with Generator.open(llama / "run", engine=ENGINE) as generator:
        yield generator


@pytest.fixture(scope="module")
def prompt():
    return make_tokenizer()(PROMPT, return_tensors="pt").input_ids


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_are_those_of_stock_generate(tmp_path, prompt, family, tied, precision, dtype):
    source = make_source(tmp_path / "source", family, tied)
    run = bring_in(source, tmp_path / "run", precision)
    expected = stock(source, prompt, dtype)
    assert len(set(expected)) > 4  # or it would prove little
    with Generator.open(run.path, engine=ENGINE) as generator:
        assert paged(generator, prompt) == expected
        text = generator.complete(PROMPT, max_new_tokens=NEW)
    assert text == make_tokenizer().decode(expected, skip_special_tokens=True)


def test_a_seed_gives_the_same_sample_again(generator, prompt):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    samples = [paged(generator, prompt, temperature=1.5, seed=seed) for seed in (3, 3, 4)]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_a_sample_of_one_is_the_likeliest(generator, prompt, how):
    assert paged(generator, prompt, temperature=2.0, seed=9, **how) == paged(generator, prompt)


def test_top_k_leaves_the_likeliest():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.9, -1.0]])
    pick = Pick(temperature=5.0, top_k=2, seed=0)
    assert {pick(torch.zeros(1, 1, dtype=torch.int64), scores) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_any_token_of_the_eos_list_stops(llama, tmp_path, prompt, where):
    source = tmp_path / "source"
    shutil.copytree(llama / "source", source)
    free = stock(source, prompt, torch.bfloat16)
    # The first of two tokens that come late enough: the one named second in the list.
    end = next(token for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    path = source / where
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "eos_token_id": [270, end]}))
    if where == "config.json":
        (source / "generation_config.json").unlink()
    run = bring_in(source, tmp_path / "run")
    expected = stock(source, prompt, torch.bfloat16, stop=(270, end))
    assert 3 <= len(expected) < NEW
    with Generator.open(run.path, engine=ENGINE) as generator:
        assert generator._stop == {270, end}
        assert paged(generator, prompt, stop=generator._stop) == expected
        text = generator.complete(PROMPT, max_new_tokens=NEW)
        assert text == make_tokenizer().decode(expected, skip_special_tokens=True)
        # The answer that ended by itself leaves the state usable too.
        assert generator.complete(PROMPT, max_new_tokens=NEW) == text


def test_stopping_early_leaves_the_next_answer_whole(generator, prompt):
    expected = paged(generator, prompt)
    for count in (1, 2, 5):
        assert paged(generator, prompt, new=count) == expected[:count]
    following = next_tokens(generator._model, prompt, Pick(), frozenset())
    assert next(following) == expected[0]
    del following
    assert paged(generator, prompt) == expected


def test_a_failure_leaves_the_next_answer_whole(generator, prompt, monkeypatch):
    expected = paged(generator, prompt)
    kept = []
    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(generator._model.partition, "run_block", interrupt)
            with pytest.raises(KeyboardInterrupt) as caught:
                paged(generator, prompt)
        kept.append(caught)
    assert paged(generator, prompt) == expected


def interrupt(_index, parameters, *_):
    held = dict(parameters)
    raise KeyboardInterrupt(next(iter(held)))


def test_chat_goes_through_the_template(llama, generator):
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = make_tokenizer()(rendered, return_tensors="pt").input_ids
    expected = make_tokenizer().decode(
        stock(llama / "source", ids, torch.bfloat16, new=12), skip_special_tokens=True
    )
    assert generator.chat(TURNS[:1], max_new_tokens=12) == expected


def test_chat_without_a_template_is_refused(tmp_path):
    source = make_source(tmp_path / "source", template=False, layers=1)
    run = bring_in(source, tmp_path / "run")
    with Generator.open(run.path, engine=ENGINE) as generator:
        with pytest.raises(ConfigError, match="no chat template"):
            generator.chat(TURNS[:1])
        generator.complete(PROMPT, max_new_tokens=1)


def test_what_cannot_be_answered_is_refused(generator):
    with pytest.raises(DataError, match="prompt is empty"):
        generator.complete("")
    for wrong in (
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"temperature": "a"},
        {"temperature": float("nan")},
        {"top_p": None},
        {"top_k": 1.5},
        {"max_new_tokens": 2.5},
        {"seed": "x"},
        {"seed": 2**70},
        {"seed": -1},
        {"prompt": []},
        {"prompt": ["a"]},
        {"prompt": None},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            generator.complete(**{"prompt": PROMPT} | wrong)
    generator.complete(PROMPT, max_new_tokens=1)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], r"messages is \[\]"),
        (None, "messages is None"),
        ("Hi", "messages is 'Hi'"),
        ({"role": "user", "content": "Hi"}, "messages is {"),
        (["a"], r"messages\[0\] is 'a'"),
        ([*TURNS[:1], {"role": "user"}], r"messages\[1\] is {'role': 'user'}"),
        ([{"role": "user", "content": None}], r"messages\[0\] is .*both text"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused(generator, messages, reason):
    with pytest.raises(ConfigError, match=reason):
        generator.chat(messages)


def test_messages_that_the_template_refuses_are_an_error_of_the_messages(generator, monkeypatch):
    monkeypatch.setattr(
        generator._tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(DataError, match="the chat template refuses the messages: roles must alternate"):
        generator.chat(TURNS[:1])


def test_numbers_of_any_kind_sample_alike(generator):
    """Transformers' own sampling takes no whole number for a temperature."""
    texts = {
        generator.complete(PROMPT, 4, temperature, 0.9, top_k)
        for temperature, top_k in ((2.0, 5), (2, np.int64(5)), (np.float32(2), 5))
    }
    assert len(texts) == 1


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    run = bring_in(make_source(tmp_path / "source", vocabulary=100, layers=1), tmp_path / "run")
    with (
        Generator.open(run.path, engine=ENGINE) as generator,
        pytest.raises(ConfigError, match="the model's vocabulary has 100"),
    ):
        generator.complete("\u20ac")


def test_a_run_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        Generator.open(tmp_path, engine=ENGINE)
