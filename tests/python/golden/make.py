"""Make the golden runs again, with the code of today: never without need.

    PYTHONPATH=python:tests:tests/python python tests/python/golden/make.py

What lies here was made so by version 0.1.0 at commit b2b892d, and is what that version left on a drive. To make it
anew is to give up the promise that ``test_golden.py`` keeps: that runs of that version go on with this one.
"""

import hashlib
import json
import os
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
import zstandard
from transformers import AutoTokenizer
from typer.testing import CliRunner

from corpus import make_tokenizer, write
from megatrain_io.cli.app import app
from megatrain_io.config.parse import load
from megatrain_io.data.prepare import DataOptions, prepare
from megatrain_io.errors import InterruptedRunError
from reference.reference import build, tiny_config
from runs import WORDS, start

HERE = Path(__file__).parent
STEPS, STOP = 5, 3
GOLDEN = {
    "bf16": {"tied": True, "memory": {"durability": "step"}},
    "fp32": {"tied": False, "memory": {"durability": "scratch", "store_dir": ["run/drive-a", "run/drive-b"]}},
}


def make(name: str, *, tied: bool, memory: dict[str, object]) -> None:
    """In the current folder: a model, data, a configuration and its run, which was interrupted after ``STOP`` steps."""
    config = tiny_config(
        "llama", tied, vocab_size=263, hidden_size=16, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    build(config, seed=1).to(dtype).save_pretrained("model")
    make_tokenizer(template=None).save_pretrained("model")
    texts = [" ".join(WORDS[i % 5 : i % 5 + 3 + i % 7]) for i in range(2 * STEPS)]
    write(Path("train.jsonl"), [{"text": text} for text in texts])
    settings = {
        "model": "model",
        "output_dir": "run",
        "data": {"train": ["train.jsonl"], "max_length": 64, "packing": False},
        "train": {
            "max_steps": STEPS,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.003,
            "weight_decay": 0.1,
            "precision": name,
            "device": "cpu",
        },
        "memory": {"ram": "16MiB", "threads": 1, **memory},
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    try:
        start(load(Path("run.yaml"))[0], stop=STOP)
    except InterruptedRunError:
        return
    raise AssertionError("it was to be interrupted")


def expected_of() -> dict[str, object]:
    """What the commands say of the run in the current folder, and the micro-batches of the steps to come."""
    exports = {}
    for dtype in ("bf16", "fp32"):
        out = Path(f"out-{dtype}")
        called("export", "run", str(out), "--dtype", dtype)
        exports[dtype] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    verified = json.loads(called("verify", "run", "--json"))
    # The rows that this version trains next.
    options = DataOptions((Path("train.jsonl"),), max_length=64, packing=False)
    data = prepare(options, AutoTokenizer.from_pretrained("model"), Path("run/data"), packs=True)
    assert data.reused
    steps = [
        [data.train.micro_batch([row]) for row in data.order.indices_for_step(step, 2)]
        for step in range(STOP + 1, STEPS + 1)
    ]
    return {
        "verify": {name: verified[name] for name in ("generation", "extents", "nbytes", "damaged")},
        "export": exports,
        "micro_batches": [
            [
                {
                    "input_ids": b.input_ids.tolist(),
                    "labels": [[-100, *row[:-1]] for row in b.shift_labels.tolist()],
                }
                for b in step
            ]
            for step in steps
        ],
    }


def called(*arguments: str) -> str:
    """Standard output of a command."""
    result = CliRunner().invoke(app, arguments, prog_name="megatrain-io")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def pack(name: str) -> None:
    """Everything in the current folder but exports, with nothing of who packed it and when."""

    def nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    compressor = zstandard.ZstdCompressor(level=22, write_checksum=True)
    with (
        (HERE / f"{name}.tar.zst").open("wb") as file,
        compressor.stream_writer(file) as stream,
        tarfile.open(mode="w|", fileobj=stream) as archive,
    ):
        for path in ("model", "run", "run.yaml", "train.jsonl"):
            archive.add(path, filter=nobody)


def main() -> None:
    """All of them."""
    torch.set_num_threads(1)
    before = Path.cwd()
    for name, how in GOLDEN.items():
        with TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                make(name, **how)
                pack(name)
                expected = json.dumps(expected_of(), separators=(",", ":"))
            finally:
                os.chdir(before)
        (HERE / f"{name}.json").write_text(expected + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
