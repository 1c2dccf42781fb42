"""A small model of any family of transformers, driven through every command and compared with training in memory.

    python tests/python/support/families.py all --results FILE --table docs/models.md

drives every causal language model of the installed transformers, each in a process of its own with a limit of time and
memory, writes a line of JSON as each is done, and the table when all are. ``make families`` does that.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from typer.testing import CliRunner

from families_table import (
    ACCEPTED,
    ACCUMULATION,
    PRECISIONS,
    STEPS,
    Row,
    render,
    rows_in,
    table_rows,
)
from megatrain_io import generate
from megatrain_io.cli.app import app
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.planning import compute_time, resolve
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.open_store import open_store
from paged import PLANES, all_planes
from reference.reference import Hyperparameters, Result
from reference.reference import train as train_in_memory
from small_models import FAMILIES, load, make_published, small_config

PROMPT = "The quick brown Pony"
NEW = 8
UNSUPPORTED = 5  # exit code of what refuses a model
HYPERPARAMETERS = Hyperparameters(lr=[1e-3] * STEPS, beta1=0.9, beta2=0.95, weight_decay=0.1)


# ---------------------------------------------------------------------------------------------- commands


@dataclass
class Outcome:
    """What became of a family.

    Attributes:
        stage: ``done``, or what ended it: a command, ``compare``, ``build``.
        seconds: that it took.
        code: exit code of the command.
        message: its sentence.
        fault: an exception that is none of ours.
        wrong: what differs from training in memory.
        generation: ``equal``, or why it was not compared.
    """

    stage: str
    seconds: float
    code: int = 0
    message: str = ""
    fault: BaseException | None = None
    wrong: list[str] = field(default_factory=list)
    generation: str = ""

    @property
    def is_refused(self):
        """Whether a command refused it with a sentence for a person, and not by accident."""
        return self.stage != "done" and self.fault is None and self.code not in (0, 1)


def run(*arguments):
    """A command in this process; its result, as ``typer.testing`` has it."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@contextmanager
def watched() -> Iterator[tuple[list[list[dict[str, torch.Tensor]]], list[int]]]:
    """The micro-batches of each step that is trained in the context, as the reference takes them, and the tokens
    that are generated.
    """
    steps: list[list[dict[str, torch.Tensor]]] = []
    tokens: list[int] = []
    training_step, next_tokens = PagedPartition.training_step, generate.next_tokens

    def noting_steps(model, micro_batches, adamw, **how):
        steps.append([as_stock(batch) for batch in micro_batches])
        return training_step(model, micro_batches, adamw, **how)

    def noting_tokens(*arguments):
        for token in next_tokens(*arguments):
            tokens.append(token)
            yield token

    with (
        mock.patch.object(PagedPartition, "training_step", noting_steps),
        mock.patch.object(generate, "next_tokens", noting_tokens),
    ):
        yield steps, tokens


@contextmanager
def calibrating_briefly() -> Iterator[None]:
    """Computing is measured before the first step, as it is on a machine that ``bench`` has measured."""

    def calibrate(job):
        try:
            return compute_time.measured_seconds(job.partition, job.layout, job.micro_batch)
        except Exception:  # noqa: BLE001 - as the real one does
            return None

    with ExitStack() as patches:
        for owner, name, value in (
            (compute_time, "_ROUNDS", 1),
            (compute_time, "_SECONDS", 0.0),
            (resolve, "calibrate", calibrate),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


def as_stock(batch):
    """A micro-batch as stock models take it: labels are not shifted."""
    ignored = torch.full_like(batch.shift_labels[:, :1], -100)
    inputs = {
        "input_ids": batch.input_ids,
        "labels": torch.cat([ignored, batch.shift_labels[:, :-1]], dim=1),
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
    }
    return {name: value.clone() for name, value in inputs.items() if value is not None}


def commands(folder, here, precision, options=(), import_options=()):
    """The commands that a family passes, by stage."""
    settings = [
        f"model={folder / 'model'}",
        f"output_dir={here}",
        f"data.train={folder / 'train.jsonl'}",
        "data.max_length=32",
        f"train.max_steps={STEPS}",
        f"train.gradient_accumulation_steps={ACCUMULATION}",
        f"train.learning_rate={HYPERPARAMETERS.lr[0]}",
        "train.lr_scheduler_type=constant",
        f"train.weight_decay={HYPERPARAMETERS.weight_decay}",
        f"train.adam_beta1={HYPERPARAMETERS.beta1}",
        f"train.adam_beta2={HYPERPARAMETERS.beta2}",
        f"train.adam_epsilon={HYPERPARAMETERS.eps}",
        f"train.precision={precision}",
        "train.device=cpu",
        "memory.io_backend=threads",
        "memory.threads=1",
        "memory.ram=1GiB",
        *options,
    ]
    return {
        "import": (
            "import",
            folder / "model",
            here,
            "--precision",
            precision,
            "--io-backend",
            "threads",
            *import_options,
            "--json",
        ),
        "train": ("train", *settings, "--json"),
        "export": ("export", here, here / "out", "--json"),
        "generate": ("generate", here, "--prompt", PROMPT, "--max-new-tokens", NEW, "--json"),
    }


def drive(folder, config, precision, *, options=(), import_options=(), saving=None):
    """Import, three steps, export and generate, by the command line; all of it compared with stock torch in memory.

    Args:
        folder: that is made, for all files.
        config: of the model.
        precision: ``fp32`` or ``bf16``.
        options: further settings of training.
        import_options: further options of import; a run keeps them.
        saving: options of ``save_pretrained`` for the folder that is imported.
    """
    began = time.perf_counter()
    seconds = lambda: time.perf_counter() - began  # noqa: E731
    folder.mkdir(parents=True, exist_ok=True)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    try:
        make_published(folder, config, dtype, **saving or {})
    except Exception as error:  # noqa: BLE001 - of transformers' own
        message = refused_by_config(folder / "config", config)
        if message is not None:
            return Outcome("plan", seconds(), UNSUPPORTED, message)
        return Outcome("build", seconds(), message=one_line(error), fault=error)
    here, refused = folder / precision, ""
    with watched() as (steps, tokens):
        for stage, arguments in commands(folder, here, precision, options, import_options).items():
            result = run(*arguments)
            fault = result.exception if not isinstance(result.exception, SystemExit) else None
            if result.exit_code or fault is not None:
                message = (
                    one_line(fault) if fault is not None else json.loads(result.stdout)["error"]["message"]
                )
                ended = Outcome(stage, seconds(), result.exit_code, message, fault)
                if stage != "generate" or not ended.is_refused:
                    return ended
                refused = message
    try:
        wrong, note = [*differences(folder / "model", here, dtype, steps)], ""
        if wrong and (alone := text_model_alone(folder, dtype)) is not None:
            of_text = [*differences(alone, here, dtype, steps)]
            wrong, note = of_text, "" if of_text else OF_TEXT_ALONE
        generation = f"refused: {refused}" if refused else compared_tokens(here / "out", tokens)
    except Exception as error:  # noqa: BLE001 - of transformers' own
        return Outcome("compare", seconds(), message=one_line(error), fault=error)
    if generation.startswith("differs"):
        wrong.append(generation)
    return Outcome("done", seconds(), message=note, wrong=wrong, generation=generation)


def refused_by_config(folder, config):
    """What ``plan`` refuses a configuration with, of which transformers makes no small model; None if it does not."""
    try:
        config.save_pretrained(folder)
    except Exception:  # noqa: BLE001 - of transformers' own
        return None
    result = run("plan", folder, "--json")
    return json.loads(result.stdout)["error"]["message"] if result.exit_code == UNSUPPORTED else None


# -------------------------------------------------------------------------------------------- comparing


INNER = "model.language_model."
OF_TEXT_ALONE = "has the bits of its text model alone; in transformers itself the whole class has others"


def text_model_alone(folder, dtype):
    """A folder with the text model of a published one, as the class that transformers has for it; None without one."""
    whole = load(folder / "model", dtype)
    text = getattr(whole.config, "text_config", None)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    alone = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]._from_config(text, dtype=dtype)
    there = whole.state_dict()
    alone.load_state_dict(
        {name: there[whole_name(name) if whole_name(name) in there else name] for name in alone.state_dict()}
    )
    alone.save_pretrained(folder / "text")
    return folder / "text"


def whole_name(name):
    """The name that a tensor of a text model has in the whole one."""
    return name.replace("model.", INNER, 1)


def differences(source, here, dtype, steps) -> Iterator[str]:
    """What of a run is not as in memory, of the model of ``source``: losses, state, or its export."""
    assert len(steps) == STEPS, f"{len(steps)} steps were trained"
    assert {len(step) for step in steps} == {ACCUMULATION}
    model = load(source, dtype)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = model.state_dict().keys()
    model.train()
    expected: Result = train_in_memory(model, steps, HYPERPARAMETERS, compute_dtype=None)
    losses = [json.loads(line)["loss"] for line in (here / "metrics.jsonl").read_text().splitlines()]
    if losses != expected.losses:
        yield f"losses {losses} differ from {expected.losses}"
    with open_store(RunFolder(here), engine="threads") as state:
        planes = all_planes(state)
    yield from differing_planes(planes, expected)
    exported = load(here / "out")
    parameters = dict(exported.named_parameters())
    if source.name == "text":
        parameters = {name.replace(INNER, "model."): each for name, each in parameters.items()}
        parameters = {name: each for name, each in parameters.items() if name in expected.weight}
        kept = {}
    elif type(exported) is not type(model):
        yield f"the export is a {type(exported).__name__}"
    if parameters.keys() != expected.weight.keys():
        yield f"parameters {sorted(parameters.keys() ^ expected.weight.keys())[:3]} are on one side alone"
    for name, weight in expected.weight.items():
        if name in parameters and not same(parameters[name].detach(), weight):
            yield f"{name} of the export differs"
    for name, buffer in exported.named_buffers():
        if name in kept and not same(buffer, buffers[name]):
            yield f"buffer {name} of the export differs"


def differing_planes(planes, expected: Result) -> Iterator[str]:
    """What of a store is not as in memory; of what no gradient reached it may have weights alone.

    The store has the names of the text model by itself.
    """
    for plane in PLANES:
        for name, there in getattr(expected, plane).items():
            found = planes.get((name.replace(INNER, "model."), plane))
            if found is None and expected.exp_avg_sq.get(name, there).any():
                yield f"{plane} of {name} is not in the store"
            elif found is not None and not same(found, there):
                yield f"{plane} of {name} differs"


_BLOCK_LIST = re.compile(r"\(import: (--block-list) NAME\): it has (\S+) \([^,]*$")
_SETTING = re.compile(r"set ([\w.]+) to (\w+) in config\.json")
_SAVING = re.compile(r"save it with save_pretrained\(OUT, (save_original_format)=(False)\), then import OUT")


@dataclass(frozen=True)
class Advised:
    """How a model is driven: as published, or as refusals advise.

    Attributes:
        config: of the model.
        import_options: further options of import.
        saving: options of ``save_pretrained``.
        words: what was advised and done.
    """

    config: transformers.PreTrainedConfig
    import_options: tuple[str, ...] = ()
    saving: dict[str, bool] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def follow(self, message):
        """Do what a refusal advises as it is printed; None where it advises nothing of the kind, or what was done."""
        if found := _BLOCK_LIST.search(message):
            advised = replace(self, import_options=found.groups(), words=(" ".join(found.groups()),))
        elif _SAVING.search(message):
            saved = "saved with save_original_format=False"
            advised = replace(self, saving={"save_original_format": False}, words=(saved,))
        elif found := _SETTING.search(message):
            key, value = found.groups()
            *parts, name = key.split(".")
            config = copy.deepcopy(self.config)
            owner = functools.reduce(getattr, parts, config)
            if not hasattr(owner, name):
                return None
            setattr(owner, name, {"true": True, "false": False}.get(value, value))
            advised = replace(self, config=config, words=(f"{key} {value} in config.json",))
        else:
            return None
        return None if advised.words[0] in self.words else replace(advised, words=self.words + advised.words)


def same(one, other):
    """Whether two tensors are of the same dtype and bits, but for the sign of zero."""
    return one.dtype == other.dtype and torch.equal(one, other)


def stock_tokens(folder, prompt=PROMPT, new=NEW):
    """Tokens with which stock transformers continues a prompt, greedily, up to the one that ends it; and this one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="auto").eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    asked = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    ends = asked.eos_token_id if asked else model.config.get_text_config().eos_token_id
    how = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": ends}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    tokens = out[0, ids.shape[1] :].tolist()
    ends = {*ends} if isinstance(ends, list) else {ends}
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    return (tokens, None) if end is None else (tokens[:end], tokens[end])


def stock_text(folder, prompt=PROMPT, new=NEW):
    """What stock transformers continues a prompt with, greedily, from an exported folder; None where it cannot."""
    try:
        tokens, _ = stock_tokens(folder, prompt, new)
    except (KeyError, TypeError, ValueError):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def compared_tokens(folder, tokens):
    """``equal``, ``differs: ...``, or why stock transformers generates nothing from an export."""
    try:
        expected, _ = stock_tokens(folder)
    except Exception as error:  # noqa: BLE001 - whatever stock generate fails with
        return f"stock generate fails: {one_line(error)}"
    return "equal" if expected == tokens else f"differs: generated {tokens}, stock {expected}"


def one_line(error):
    """An exception of somebody else's, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ------------------------------------------------------------------------------- many, each in its limits


SECONDS = 300
MEMORY = 6 << 30  # of address space, beyond what libraries have mapped
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


def all_families():
    """Each model type once."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def class_of(family):
    """Name of the causal language model of a type."""
    model_type = FAMILIES[family][0] if family in FAMILIES else family
    classes = {config.model_type: model for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()}
    model = classes[model_type]
    return (model[0] if isinstance(model, tuple | list) else model).__name__


def row_of(family, precision):
    """Drive a family; what a refusal advises is followed, and said."""
    began = time.perf_counter()
    advised = None

    def row(result, stage, message="", generation=""):
        seconds = round(time.perf_counter() - began, 1)
        return Row(
            family, precision, class_of(family), result, stage, message, generation, seconds, VERSIONS,
            ", ".join(advised.words) if advised else "",
        )  # fmt: skip

    try:
        config = small_config(family)
    except Exception as error:  # noqa: BLE001 - of transformers' own
        return row(*refused_as_published(family, one_line(error)))
    advised = next_advice = Advised(config)
    while next_advice is not None:
        advised = next_advice
        outcome = drive_in_tmp(advised, precision)
        next_advice = advised.follow(outcome.message) if outcome.is_refused else None
    if outcome.fault is not None:
        trace = "".join(traceback.format_exception(outcome.fault)[-3:])
        print(f"{family} {precision} {outcome.stage}: {trace}", file=sys.stderr)
        return row(
            "not built" if outcome.stage == "build" else "failed", outcome.stage, one_line(outcome.fault)
        )
    if outcome.wrong:
        more = f" (and {len(outcome.wrong) - 3} more)" if len(outcome.wrong) > 3 else ""
        return row("wrong", "compare", f"{'; '.join(outcome.wrong[:3])}{more}", outcome.generation)
    if outcome.stage == "done":
        return row("equal", "done", outcome.message, outcome.generation)
    is_named = outcome.is_refused and config.model_type in outcome.message
    return row("refused" if is_named else "failed", outcome.stage, outcome.message)


def drive_in_tmp(advised, precision):
    """Drive a model in a temporary folder."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="families-") as folder, calibrating_briefly():
        return drive(
            Path(folder),
            advised.config,
            precision,
            import_options=advised.import_options,
            saving=advised.saving,
        )


def refused_as_published(family, reason):
    """Result, stage and message of a family that has no small configuration, for a reason."""
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        message = refused_by_config(Path(folder), AutoConfig.for_model(family))
    return ("not built", "build", reason) if message is None else ("refused", "plan", message)


def row_within(family, precision, seconds=SECONDS, memory=MEMORY, driving=row_of):
    """The row of a family that is driven in a process of its own, which ends when it takes too much."""
    context = multiprocessing.get_context("fork")  # with the libraries imported
    here, there = context.Pipe(duplex=False)

    def child():
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, resource.RLIM_INFINITY))
        there.send(driving(family, precision))

    process = context.Process(target=child)
    began = time.perf_counter()
    process.start()
    there.close()
    row = None
    if here.poll(seconds):
        with suppress(EOFError):
            row = here.recv()
        process.join(30)
    process.kill()
    process.join()
    if row is not None:
        return row
    took = time.perf_counter() - began
    how = f"took more than {seconds} s" if took >= seconds else f"its process ended with {process.exitcode}"
    return Row(family, precision, class_of(family), "failed", "limit", how, "", round(took, 1), VERSIONS)


# ------------------------------------------------------------------------------------------- the program


def main(arguments=None):
    """Drive families; the exit code is 1 if one is wrong or failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", help="all, or model types and names of FAMILIES, with commas between")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--results", type=Path, help="file of JSON lines, written as they come")
    parser.add_argument("--resume", action="store_true", help="drive only what the results have not")
    parser.add_argument(
        "--no-drive", action="store_true", help="with --resume: write the table of what is there"
    )
    parser.add_argument("--table", type=Path, help="Markdown file that is written when all are driven")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="longest time of each")
    asked = parser.parse_args(arguments)

    families = all_families() if asked.families == "all" else asked.families.split(",")
    wanted = [(family, precision) for family in families for precision in asked.precisions.split(",")]
    done = (
        {(row.family, row.precision): row for row in rows_in(asked.results) if row.versions == VERSIONS}
        if asked.resume
        else {}
    )
    if asked.results is not None:
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        asked.results.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in done.values()))
    if asked.no_drive:
        wanted = [each for each in wanted if each in done]
    for number, (family, precision) in enumerate(wanted, start=1):
        if (family, precision) in done:
            continue
        row = row_within(family, precision, asked.seconds)
        done[family, precision] = row
        if asked.results is not None:
            with asked.results.open("a") as file:
                file.write(f"{json.dumps(asdict(row))}\n")
        shown = row.message or row.generation
        print(
            f"{number:>3}/{len(wanted)} {family:<26} {precision} {row.result:<9} {row.seconds:6.1f} s  {shown}",
            flush=True,
        )
    rows = [done[each] for each in wanted]
    counts = {
        result: sum(row.result == result for row in rows) for result in sorted({row.result for row in rows})
    }
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    if asked.table is not None:
        asked.table.write_text(render(VERSIONS, len(all_families()), table_rows(rows)))
    return int(not {*counts} <= {*ACCEPTED})


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of transformers, about its own models
    torch.set_num_threads(1)
    sys.exit(main())
