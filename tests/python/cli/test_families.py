"""A model that import accepts, trains, and one that trains, generates: families by the command line."""

import os
import re

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from families import FAMILIES, VOCABULARY, drive, small_config
from megatrain_io.planning import compute_time, resolve

# Of the tests of the probe, as they were published.
PUBLISHED = [
    "deepseek_v3", "gemma4_unified_text", "gptj", "opt", "qwen3_next", "llama4_text", "mamba", "mamba2", "falcon_mamba",
    "recurrent_gemma", "jamba", "rwkv", "bamba", "zamba2", "deepseek_v4",
    "gemma3n_text", "doge", "openai-gpt", "ctrl", "bert", "bart", "fuyu", "hrm_text", "deepseek_v32", "phimoe",
    "ernie4_5_moe",
]  # fmt: skip
# What is refused, and why; newer or older transformers may build these in another way, and then they must train.
KEEPS_FP32 = r"the architecture keeps \S+ in torch\.float32"
REFUSED = {
    "deepseek_v3": KEEPS_FP32,
    "deepseek_v4": KEEPS_FP32 + "|no gradient reaches parameter",
    "zamba2": "inputs besides the hidden state that carry gradient",
    "openai-gpt": r"name it by model_options\.block_list=NAME",
    "ctrl": r"name it by model_options\.block_list=NAME",
    "deepseek_v32": KEEPS_FP32 + r"|no gradient reaches parameter \S*indexer",
    "ernie4_5_moe": KEEPS_FP32 + "|of its parameters are not trained",
    "gemma3n_text": "inputs besides the hidden state that carry gradient",
    "doge": "block by block",
    "bert": "looks at later tokens",
    "bart": "does not compute its loss by transformers' loss_function",
    "fuyu": "takes no part in the loss of a text",
    "hrm_text": "calls the blocks of|the files must be rearranged",
}
IN_SHORT = [("mixtral", "fp32"), ("mamba", "bf16"), ("gemma4", "fp32"), ("recurrent_gemma", "fp32")]
# Which are driven: "tests" for all that the tests know, "all" for all of transformers; else those in short.
ASKED = os.environ.get("MEGATRAIN_FAMILIES")
NAMES = {
    "tests": [*FAMILIES, "gemma4", *PUBLISHED],
    "all": sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}),
}
BOTH = [(name, precision) for name in NAMES.get(ASKED, ()) for precision in ("fp32", "bf16")]


@pytest.fixture(autouse=True)
def _calibrates(monkeypatch):
    """Computing is measured before the first step, as it is on a machine that ``bench`` has measured."""
    monkeypatch.setattr(compute_time, "_ROUNDS", 1)
    monkeypatch.setattr(compute_time, "_SECONDS", 0.0)

    def calibrate(job):
        try:
            return compute_time.measured_seconds(job.partition, job.layout, job.micro_batch)
        except Exception:  # noqa: BLE001 - as the real one does
            return None

    monkeypatch.setattr(resolve, "calibrate", calibrate)


def config_of(name):
    if ASKED == "all" or name != "gemma4":
        return small_config(name)
    # Heads of two widths, and keys and values that blocks leave for others, of which there are none.
    return AutoConfig.for_model(
        "gemma4_text", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16, num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "precision"), BOTH or IN_SHORT)
def test_a_family_is_imported_trained_exported_and_generates_or_is_refused_by_name(
    tmp_path, capsys, name, precision
):
    try:
        config = config_of(name)
    except Exception as error:
        if ASKED != "all":
            raise
        pytest.skip(f"no small copy: {' '.join(str(error).split())[:200]}")
    torch.manual_seed(0)
    outcome = drive(tmp_path, config, precision)
    if outcome.fault is not None:
        raise outcome.fault
    if outcome.stage != "done":
        assert outcome.is_refused, outcome
        assert config.model_type in outcome.message, outcome
        if ASKED != "all":
            assert name in REFUSED, outcome
            assert re.search(REFUSED[name], outcome.message), outcome
    if ASKED:
        with capsys.disabled():
            print(f"\n{name:<24} {precision} {outcome.stage:<8} {outcome.seconds:5.1f} s  {outcome.message}")  # noqa: T201
