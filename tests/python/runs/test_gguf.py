"""GGUF in and out: the same bits on both ways, and readers that are not ours see the same model."""

import filecmp
import json
import os

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from typer.testing import CliRunner

from gguf_models import FAMILIES, make_model, tokenizer_of
from megatrain_io.cli.app import app
from megatrain_io.errors import ConfigError, ModelFilesError, NoSpaceError, UnsupportedModelError
from megatrain_io.models.gguf_folder import GgufFolder
from megatrain_io.runs import export_gguf as export_module
from megatrain_io.runs.export_gguf import export_gguf
from megatrain_io.runs.export_model import export_model
from megatrain_io.runs.import_model import import_model

ENGINE = "threads"
TEXTS = [
    "the quick brown fox", " the  thing, in Prague.", "It's 1234 of them\n\n  there", "naïve café 日本 🦊",
    "<think>the", "a<|im_end|>the", "the <end_of_turn>the", "e\u0301te\u0301", "   ", "",
]  # fmt: skip


# The others with `make gguf`, against llama.cpp, too.
FEW = ["llama tied", "llama 3", "smollm", "qwen2 yarn", "qwen3 tied", "gemma3", "phi3 long"]


@pytest.fixture(scope="module", params=FAMILIES if "MEGATRAIN_GGUF" in os.environ else FEW)
def family(request, tmp_path_factory):
    """A folder with a model of a family, a run that was imported from it, and its GGUF file in bf16."""
    there = tmp_path_factory.mktemp("family")
    make_model(there / "model", request.param)
    import_model(there / "model", there / "run", precision="bf16", engine=ENGINE)
    export_gguf(there / "run", there / "gguf" / "model.gguf", engine=ENGINE)
    return there


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The same of one family, of which each test may break a copy."""
    there = tmp_path_factory.mktemp("llama")
    make_model(there / "model", "llama")
    import_model(there / "model", there / "run", precision="bf16", engine=ENGINE)
    export_gguf(there / "run", there / "model.gguf", engine=ENGINE)
    return there


def stock(path, folder):
    """What stock transformers makes of the weights of a GGUF file, without the accelerate that it asks for.

    The configuration is the folder's: transformers does not read all of it from GGUF.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "mistral":  # a Llama by what it computes, and by its name in GGUF
        values = config.to_dict()
        del values["model_type"], values["architectures"]
        config = AutoConfig.for_model("llama", **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert {*missing} <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model


def in_memory(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def same_model(one, other):
    """Whether two folders hold the same parameters; a Mistral that came as GGUF is called a Llama."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    wrong = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not wrong


# ------------------------------------------------------------------------------------------- both ways


def test_what_went_out_comes_in_again_with_the_same_bits(family, tmp_path):
    import_model(family / "gguf" / "model.gguf", tmp_path / "again", precision="bf16", engine=ENGINE)
    export_model(tmp_path / "again", tmp_path / "out", engine=ENGINE)
    same_model(family / "model", tmp_path / "out")
    tokens = torch.randint(3, 300, (2, 40))
    with torch.no_grad():
        logits = [
            in_memory(folder)(input_ids=tokens).logits for folder in (family / "model", tmp_path / "out")
        ]
    assert torch.equal(*logits)


def test_a_tokenizer_makes_the_same_tokens_after_both_ways(family, tmp_path):
    GgufFolder(family / "gguf" / "model.gguf").copy(
        ["config.json", *GgufFolder(family / "gguf" / "model.gguf").companions()], tmp_path
    )
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (family / "model", tmp_path))
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"], text
        ids = before(text)["input_ids"]
        assert after.decode(ids) == before.decode(ids)
    for name in ("bos_token_id", "eos_token_id", "chat_template"):
        assert getattr(after, name) == getattr(before, name)
    turns = [{"role": "user", "content": "the fox"}]
    assert after.apply_chat_template(turns, tokenize=False) == before.apply_chat_template(
        turns, tokenize=False
    )


def test_a_second_reader_finds_every_tensor_with_its_values(family):
    """The gguf package itself, and the order of rows that llama.cpp has in queries and keys."""
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(family / "gguf" / "model.gguf").tensors}
    config = AutoConfig.from_pretrained(family / "model")
    arch = "gemma3" if config.model_type == "gemma3_text" else config.model_type
    arch = "llama" if arch == "mistral" else arch
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, values in tensors(family / "model").items():
        tensor = there.pop(names.get_name(name, (".weight", ".bias")))
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(values.shape))
        expected = values.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = expected.reshape(-1, 2, config.head_dim // 2, *expected.shape[1:])
            expected = heads.swapaxes(1, 2).reshape(expected.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            expected = expected + 1
        assert np.array_equal(found, expected), name
        assert tensor.tensor_type.name == ("F32" if values.dim() == 1 else "BF16")
    assert all(name.startswith("rope_") for name in there)


def test_stock_transformers_computes_the_same_from_it(family):
    tokens = torch.randint(3, 300, (2, 30))
    models = stock(family / "gguf" / "model.gguf", family / "model"), in_memory(family / "model")
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=tokens).logits for model in models))


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0", "bf16"])
def test_matrices_are_written_as_asked(llama, tmp_path, dtype):
    """Quantised by the library as a whole, whatever the chunks were that they came in."""
    result = CliRunner().invoke(
        app, ["export", str(llama / "run"), str(tmp_path / "out.gguf"), "--to", "gguf", "--dtype", dtype]
    )
    assert result.exit_code == 0, result.output
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    source = tensors(llama / "model")
    for name, place in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down"),
    ):
        values = source[f"{name}.weight"].float().numpy()
        assert there[f"{place}.weight"].tensor_type == kind
        expected = gguf.quantize(values, kind)
        assert there[f"{place}.weight"].data.tobytes() == expected.tobytes()
    assert there["output_norm.weight"].tensor_type.name == "F32"


def test_what_is_quantised_comes_in_as_what_it_stands_for(llama, tmp_path):
    export_gguf(llama / "run", tmp_path / "q8.gguf", dtype="q8_0", engine=ENGINE)
    folder = GgufFolder(tmp_path / "q8.gguf")
    assert any("starting point for training" in note for note in folder.notes)
    import_model(tmp_path / "q8.gguf", tmp_path / "run", precision="fp32", engine=ENGINE)
    export_model(tmp_path / "run", tmp_path / "out", engine=ENGINE)
    expected = stock(tmp_path / "q8.gguf", llama / "model").state_dict()
    found = tensors(tmp_path / "out")
    assert found.keys() <= expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_a_run_starts_from_a_file_and_is_planned_from_it(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the quick brown fox"}) + "\n")
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": str(llama / "model.gguf"),
                "output_dir": "run",
                "data": {"train": "text.jsonl", "max_length": 32},
                "train": {"max_steps": 1, "learning_rate": 1e-3, "precision": "bf16"},
                "memory": {"io_backend": ENGINE, "threads": 1},
            }
        )
    )
    for words in (
        ["plan", str(llama / "model.gguf"), "--config", "run.yaml"],
        ["train", "--config", "run.yaml"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


# ------------------------------------------------------------------------------------------- Modelfile


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (
            "qwen2",
            (
                'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n'
                '{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"""\n'
                'PARAMETER stop "<|im_end|>"\n'
            ),
        ),
        (
            "gemma",
            (
                'TEMPLATE """{{ if .System }}<start_of_turn>system\n{{ .System }}<end_of_turn>\n{{ end }}'
                "<start_of_turn>user\n{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n{{ .Response }}<end_of_turn>\n"
                '"""\nPARAMETER stop "<eos>"\n'
            ),
        ),
    ],
)
def test_a_modelfile_writes_conversations_as_the_template_does(kind, lines):
    tokenizer = tokenizer_of(kind)
    assert export_module.modelfile_of(tokenizer, [tokenizer.eos_token_id]) == lines


def test_instructions_that_are_always_there_are_a_system_of_their_own():
    """SmolLM2, whose turns begin with its bos: that is not taken off, as nobody else puts it there."""
    tokenizer = tokenizer_of("qwen2")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind<|im_end|>\n{% endif %}"
        + tokenizer.chat_template
    )
    assert export_module.modelfile_of(tokenizer, []) == (
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n'
        '{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"""\n'
        'SYSTEM """You are kind"""\n'
    )


def test_a_template_without_a_pattern_is_left_to_ollama():
    tokenizer = tokenizer_of("qwen2")
    tokenizer.chat_template = "{{ messages | length }}"
    assert export_module.modelfile_of(tokenizer, []) == ""


# ------------------------------------------------------------------------------------------- refusals


def test_what_is_in_the_way_stays(llama, tmp_path):
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(ConfigError, match="Modelfile exists, and nothing is overwritten"):
        export_gguf(llama / "run", tmp_path / "out.gguf", engine=ENGINE)
    with pytest.raises(ConfigError, match=r"does not end with \.gguf"):
        export_gguf(llama / "run", tmp_path / "out", engine=ENGINE)
    with pytest.raises(ConfigError, match="must be one of bf16, f16, f32, q8_0"):
        export_gguf(llama / "run", tmp_path / "a" / "out.gguf", dtype="q4_0", engine=ENGINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile"]


def test_nothing_is_left_of_an_export_that_failed(llama, tmp_path, monkeypatch):
    def broken(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module.GgufTensorWriter, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(llama / "run", tmp_path / "out" / "m.gguf", engine=ENGINE)
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_told_beforehand(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(NoSpaceError, match="nothing was written"):
        export_gguf(llama / "run", tmp_path / "m.gguf", engine=ENGINE)


def test_what_does_not_fit_fp16_is_refused_by_name(llama, tmp_path):
    weights = tensors(llama / "model")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    (tmp_path / "model").mkdir()
    for path in (llama / "model").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    import_model(tmp_path / "model", tmp_path / "run", precision="bf16", engine=ENGINE)
    with pytest.raises(ModelFilesError, match=r"up_proj.weight has a value of 99840, and fp16 ends at 65504"):
        export_gguf(tmp_path / "run", tmp_path / "m.gguf", dtype="f16", engine=ENGINE)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen3 tied",
            {"attention_bias": True},
            "its attention has biases, which llama.cpp does not compute",
        ),
        ("gemma2", {"query_pre_attn_scalar": 100}, "it scales attention by 100, not by 16"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "has a sliding window"),
        ("llama", {"hidden_act": "gelu"}, "it activates by 'gelu'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, changes, message):
    from megatrain_io.models.gguf_families import model_for

    model_type, values, _ = FAMILIES[family]
    with pytest.raises(UnsupportedModelError, match=message):
        model_for(AutoConfig.for_model(model_type, **(values | changes)))


def test_other_families_are_refused_by_name():
    from megatrain_io.models.gguf_families import model_for

    with pytest.raises(UnsupportedModelError, match="olmo2 is not written as GGUF; written are gemma2"):
        model_for(AutoConfig.for_model("olmo2"))


def test_a_folder_of_gguf_names_the_file(llama, tmp_path):
    result = CliRunner().invoke(app, ["import", str(llama / "empty"), str(tmp_path / "run")])
    assert result.exit_code != 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m.gguf").write_bytes((llama / "model.gguf").read_bytes())
    with pytest.raises(
        ModelFilesError, match=r"give the file itself in place of the folder, .*folder/m\.gguf"
    ):
        import_model(tmp_path / "folder", tmp_path / "run", engine=ENGINE)


def test_a_missing_library_is_one_sentence(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatrain-io\[gguf\]'"):
        import_model(llama / "model.gguf", tmp_path / "run", engine=ENGINE)


def test_the_modelfile_and_the_file_are_the_same_twice(llama, tmp_path):
    for name in ("a", "b"):
        export_gguf(llama / "run", tmp_path / name / "m.gguf", engine=ENGINE)
    assert filecmp.cmp(tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf", shallow=False)
    assert (tmp_path / "a" / "Modelfile").read_text().startswith("FROM ./m.gguf\nTEMPLATE")
