"""Families by the command line: what import accepts trains to the bits of memory, and what trains generates."""

import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import families
import paged
from families import Row, calibrating_briefly, drive, row_within
from small_models import VOCABULARY, small_config

MODELS = Path(__file__).parents[3] / "docs" / "models.md"

# Between them they have every mechanism, each in the precision that says more of it.
SPREAD = [
    ("llama", "fp32"),  # rotary positions, grouped heads
    ("llama tied", "bf16"),  # one table for embedding and head
    ("qwen3", "bf16"),  # norms of queries and keys
    ("mistral", "fp32"),  # a sliding window
    ("gemma2", "bf16"),  # windows in turn, capped scores, a scaled embedding
    ("gpt2", "fp32"),  # learned positions
    ("opt", "bf16"),  # learned positions with an offset
    ("bloom", "fp32"),  # alibi, a norm behind the embedding
    ("falcon", "bf16"),  # attention and MLP side by side, one key and value head
    ("gpt_neox", "fp32"),  # the same, rotary positions of a part of each head
    ("codegen", "bf16"),  # rotary tables that only loading makes exact
    ("phi3", "fp32"),  # projections in one matrix
    ("cohere", "bf16"),  # scaled scores
    ("mixtral", "fp32"),  # experts
    ("qwen3_moe", "bf16"),  # experts in some blocks
    ("mamba", "fp32"),  # a state space, and a matrix times a batch, for which torch looks at requires_grad
    ("recurrent_gemma", "fp32"),  # a recurrence, and attention in some blocks
    ("olmo2", "bf16"),  # norms behind
    ("deepseek_v3", "bf16"),  # latent attention, routers in fp32, trained buffers
    ("gemma4 sides", "fp32"),  # inputs of the embedding for every block, keys and values for later blocks
    ("gemma3n sides", "bf16"),  # the same, and several hidden states
]
SIDE_INPUTS = {"gemma4 sides": "gemma4_text", "gemma3n sides": "gemma3n_text"}
# What may be refused as of today; all others must be equal.
MAY_BE_REFUSED: dict[str, str] = {}


def config_of(name):
    if name not in SIDE_INPUTS:
        return small_config(name)
    sizes = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    return paged.config_of(SIDE_INPUTS[name], tied=True, **sizes)


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
@pytest.mark.parametrize(("name", "precision"), SPREAD)
def test_a_family_has_the_bits_of_memory_in_training_export_and_generation_or_is_refused_by_name(
    tmp_path, name, precision
):
    config = config_of(name)
    torch.manual_seed(0)
    with calibrating_briefly():
        outcome = drive(tmp_path, config, precision)
    if outcome.fault is not None:
        raise outcome.fault
    assert outcome.wrong == []
    if outcome.stage != "done":
        assert outcome.is_refused, outcome
        assert config.model_type in outcome.message, outcome
        assert re.search(MAY_BE_REFUSED[name], outcome.message), outcome
        return
    assert outcome.generation == "equal"


# ------------------------------------------------------------------------------------- the program itself


def test_one_bit_that_is_not_as_in_memory_is_named(tmp_path, monkeypatch):
    in_memory = families.train_in_memory

    def off_by_one_bit(*arguments, **how):
        result = in_memory(*arguments, **how)
        result.exp_avg["model.norm.weight"].view(torch.int32)[0] ^= 1
        return replace(result, losses=[result.losses[0], *result.losses[:2]])

    monkeypatch.setattr(families, "train_in_memory", off_by_one_bit)
    outcome = drive(tmp_path, small_config("llama"), "fp32")
    assert [re.sub(r"\[.*?\]", "[]", wrong) for wrong in outcome.wrong] == [
        "losses [] differ from []", "exp_avg of model.norm.weight differs"
    ]  # fmt: skip
    assert families.compared_tokens(tmp_path / "fp32" / "out", [7]).startswith(
        "differs: generated [7], stock ["
    )


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
@pytest.mark.parametrize(
    ("family", "advice"),
    [
        ("big_bird", "attention_type original_full in config.json, is_decoder true in config.json"),
        ("lara_mini", "saved with save_original_format=False"),
    ],
)
def test_what_a_refusal_advises_is_followed_as_it_is_printed(family, advice):
    driven = families.row_of(family, "fp32")
    assert (driven.result, driven.advice) == ("equal", advice), driven
    (*_, notes) = families.table_rows([driven])[0]
    assert notes == f"as the refusal advises: {advice}"


def test_advice_that_the_driver_cannot_follow_is_left():
    published = families.Advised(small_config("llama"))
    for message in (
        "it has a.b (3 of X), c.d (3 of Y)", "name it (import: --block-list NAME): it has a (1 of X), b (2 of Y)",
        "set is_decoder to true in config.json", "choose another",
    ):  # fmt: skip
        assert published.follow(message) is None
    once = published.follow("set use_cache to false in config.json")
    assert (once.config.use_cache, published.config.use_cache) == (False, True)
    assert once.follow("set use_cache to false in config.json") is None, "what did not help is not done again"


def row(family, precision="fp32", result="equal", **values):
    made = Row(
        family, precision, "LlamaForCausalLM", result, "done", "", "equal", 1.0, "transformers 5, torch 2"
    )
    return replace(made, **values)


@pytest.mark.filterwarnings("ignore")  # of forks beside threads
def test_what_takes_too_long_or_ends_its_process_is_a_row_all_the_same():
    def dies(*_):
        raise SystemExit(3)

    def takes_all(family, precision):
        return row(family, precision, message=str(len(bytearray(1 << 32))))

    assert row_within("llama", "fp32", 0, driving=lambda *_: signal.pause()).message == "took more than 0 s"
    assert row_within("llama", "fp32", driving=dies).message == "its process ended with 3"
    assert row_within("llama", "fp32", memory=1 << 28, driving=takes_all).result == "failed"
    assert row_within("llama", "fp32", driving=row) == row("llama")


def test_results_are_written_as_they_come_and_a_stopped_drive_goes_on(tmp_path, monkeypatch, capsys):
    driven = []

    def driving(family, precision, _seconds):
        if len(driven) == 3:
            raise KeyboardInterrupt
        driven.append((family, precision))
        return row(family, precision, "wrong" if family == "gpt2" else "equal", versions=families.VERSIONS)

    monkeypatch.setattr(families, "row_within", driving)
    how = ["llama,gpt2", "--results", str(tmp_path / "r.jsonl"), "--table", str(tmp_path / "t.md")]
    with pytest.raises(KeyboardInterrupt):
        families.main(how)
    assert len(families.rows_in(tmp_path / "r.jsonl")) == 3
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('{"family": "gp')  # the power went
    monkeypatch.setattr(families, "row_within", lambda *_: row("gpt2", "bf16", "wrong"))
    assert families.main([*how, "--resume"]) == 1
    assert "2 equal, 2 wrong" in capsys.readouterr().out
    assert "| gpt2 | LlamaForCausalLM | wrong | wrong | equal | |" in (tmp_path / "t.md").read_text()


def test_a_table_is_read_back_as_it_was_written():
    rows = [
        row("a"), row("a", "bf16"), row("b", result="refused", message="b: it | will not."),
        row("b", "bf16", "refused", message="b: it | will not."), row("c"),
        row("c", "bf16", "refused", message="c: not in bf16", generation=""),
        row("d", generation="stock generate fails: KeyError: 'x'"), row("d", "bf16"),
    ]  # fmt: skip
    text = families.render("transformers 5, torch 2", 12, families.table_rows(rows))
    versions, total, cells = families.parse(text)
    assert families.render(versions, total, cells) == text
    assert (versions, total) == ("transformers 5, torch 2", 12)
    assert [cell[2:] for cell in cells] == [
        ("equal", "equal", "equal", ""),
        ("refused", "refused", "equal", r"it \| will not"),
        ("equal", "refused", "equal", "bf16: not in bf16"),
        ("equal", "equal", "see notes", "stock generate fails: KeyError: 'x'"),
    ]


def test_the_table_of_families_is_what_the_program_writes():
    """Versions need not match: newer transformers come, and its types are driven when the table is made again."""
    text = MODELS.read_text()
    versions, total, cells = families.parse(text)
    assert families.render(versions, total, cells) == text, (
        "make families writes docs/models.md, and nobody else"
    )
    assert len(cells) <= total
    assert re.fullmatch(r"transformers [\d.]+, torch [\d.]+", versions)
    assert [cell[0] for cell in cells] == sorted({cell[0] for cell in cells})
    for name, _, fp32, bf16, _, notes in cells:
        assert fp32 in families.ACCEPTED, name
        assert bf16 in (*families.ACCEPTED, ""), name  # not driven
        assert notes or {fp32, bf16} <= {"equal", ""}, name
