import shutil
import socket
from pathlib import Path

import pytest
import torch

from corpus import make_tokenizer, write
from megatrain_io.errors import InterruptedRunError, UnsupportedModelError
from megatrain_io.planning import memory_needs
from reference.reference import build, tiny_config
from runs import WORDS, configured, planes_of, start


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may use the network, and so nothing of the package does."""

    connect = socket.socket.connect

    def refuse(self, address):
        # Processes of one machine may talk to each other.
        assert self.family == socket.AF_UNIX, "the network was used"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="session")
def _no_profile(tmp_path_factory):
    """What this machine was measured to do is no matter of a test that does not ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    """Thread counts change the bits of some matrix products, and spinning threads slow busy machines."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _one_dry_run():
    """Whole runs of the same shapes are planned with one dry run, which took two thirds of their CPU time."""
    dry_run, known = memory_needs.dry_run, {}

    def remembered(partition, layout, micro_batches, *, slice_tokens):
        try:
            config = partition.config.to_json_string(use_diff=False)
        except UnsupportedModelError:  # a module without a configuration
            return dry_run(partition, layout, micro_batches, slice_tokens=slice_tokens)
        model = (config, partition.spec, partition.liger_version)
        numbers = {batch: number for number, batch in enumerate(dict.fromkeys(micro_batches))}
        batches = [
            [
                None if tensor is None else (tensor.shape, tensor.cpu().numpy().tobytes())
                for tensor in vars(batch).values()
            ]
            for batch in numbers
        ]
        order = [numbers[batch] for batch in micro_batches]
        key = repr((model, layout.manifest({}), batches, order, slice_tokens))
        if key not in known:
            known[key] = dry_run(partition, layout, micro_batches, slice_tokens=slice_tokens)
        partition.train()
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_needs, "dry_run", remembered)
        yield


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A model folder, and data beside it."""
    folder = tmp_path_factory.mktemp("source")
    config = tiny_config("llama", tied=True, num_hidden_layers=2, vocab_size=263)
    build(config, seed=1).to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer(template=None).save_pretrained(folder / "model")
    texts = [" ".join(WORDS[i % 5 : i % 5 + 3 + i % 7]) for i in range(20)]
    write(folder / "train.jsonl", [{"text": text} for text in texts])
    write(folder / "eval.jsonl", [{"text": text} for text in texts[:3]])
    write(folder / "other.jsonl", [{"text": text.upper()} for text in texts])
    return folder


@pytest.fixture(scope="session")
def whole(source, tmp_path_factory):
    """A run that was never stopped: its folder, planes and result."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result, reporter = start(configured(source, run))
    return run, planes_of(run), result, reporter


@pytest.fixture(scope="session")
def stopped_once(source, tmp_path_factory):
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(InterruptedRunError, match="step 3 "):
        start(configured(source, run), stop=3)
    return run


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of a run that was interrupted after its third step."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))
