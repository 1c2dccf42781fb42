"""What a run that goes on may change, and what it must not.

What was trained stays trained: a change that would alter it is refused. All else holds from the next step on, and is
said.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatrain_io.config.parse import load
from megatrain_io.config.schema import RunConfig
from megatrain_io.errors import ConfigError, MegatrainIoError
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.metrics import last_report
from megatrain_io.runs.state import TrainerState
from megatrain_io.text import mib
from megatrain_io.training.fingerprint import settings_digest
from megatrain_io.training.lr_schedule import learning_rate_at

__all__ = ["changes_of", "recorded_settings"]

# They decide which rows a step trains on: with others the steps that are done would have seen other rows.
_OF_THE_PAST = {
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.precision",
    "train.seed",
}
_SIZES = {"memory.ram", "memory.vram"}
# A list of thousands of files, or the text of a template, would not fit what is committed with a step.
_LONGEST = 2000


def recorded_settings(config: RunConfig, max_steps: int) -> dict[str, Any]:
    """All settings of a run by their dotted keys, as plain JSON types; the trainer's state keeps them.

    Args:
        config: with numbers in place of ``auto``.
        max_steps: last step of the run.
    """
    content = config.model_dump(mode="json")
    found = {
        f"{section}.{key}": value
        for section in ("data", "train", "memory")
        for key, value in content[section].items()
    }
    found["train.max_steps"] = max_steps
    return {key: value for key, value in found.items() if len(json.dumps(value)) <= _LONGEST}


def changes_of(
    folder: RunFolder, progress: TrainerState, config: RunConfig, max_steps: int, *, digest: str, data: str
) -> list[str]:
    """A sentence for each setting that is not as it was when the run stopped.

    Args:
        folder: of the run.
        progress: how far it is; it has trained a step at least.
        config: with numbers in place of ``auto``.
        max_steps: last step of the run.
        digest: of all settings that decide the bits (``fingerprint.settings_digest``).
        data: SHA-256 of the tokenised data.

    Raises:
        ConfigError: the change would alter what was trained, or nothing is left to train; the message names each key,
            with its old and its new value.
    """
    before, now = progress.configuration or _written(folder, progress), recorded_settings(config, max_steps)
    changed = {key: (before[key], now.get(key)) for key in before if key in now and before[key] != now[key]}
    at = f"{folder.path} stands at step {progress.step}"
    if progress.data != data:
        # The seed decides which share of the data is held out.
        keys = {key: pair for key, pair in changed.items() if key.startswith("data.") or key == "train.seed"}
        unnamed = "no recorded setting of data differs: the files, the tokenizer or the chat template changed"
        why = _named(keys) or unnamed
        raise ConfigError(
            f"{at} with other data (fingerprint {progress.data[:8]}, now {data[:8]}): {why}. Resume with the same, or "
            "choose a new output_dir"
        )
    refused = {key: pair for key, pair in changed.items() if key in _OF_THE_PAST}
    if refused:
        raise ConfigError(
            f"{at}, and its steps were trained with other settings: {_named(refused)}. Set them back, or choose a new "
            "output_dir"
        )
    if not before and progress.settings != digest:
        raise ConfigError(
            f"{at} with other settings of train, and {folder.config} does not say which: resume with the same, or "
            "choose a new output_dir"
        )
    _refuse_the_end(progress, before, max_steps)
    return list(_said(changed, progress, config))


def _refuse_the_end(progress: TrainerState, before: Mapping[str, Any], max_steps: int) -> None:
    """Refuse a run that has nothing left to train."""
    if progress.step > max_steps:
        last = before.get("train.max_steps", progress.step)
        raise ConfigError(
            f"train.max_steps was {last} and is {max_steps}, and the run has done {progress.step} steps: steps are not "
            f"taken back. Set it above {progress.step} to go on, or export"
        )
    if progress.step == max_steps:
        raise ConfigError(
            f"the run has done all its {max_steps} steps: there is nothing left to train. Raise train.max_steps (or "
            "num_train_epochs) to go on, or export"
        )


def _said(changed: Mapping[str, tuple[Any, Any]], progress: TrainerState, config: RunConfig) -> Iterator[str]:
    train = config.train
    for key, (old, new) in changed.items():
        pair = f"{key} was {_shown(key, old)} and is {_shown(key, new)}"
        if key == "train.max_steps":
            yield f"{pair}: the run goes on from step {progress.step}, moments and all"
            if train.lr_scheduler_type != "constant":
                number = progress.step + 1 - progress.skipped_steps
                rates = (learning_rate_at(train, number, last) for last in (old, new))
                old_rate, new_rate = (f"{rate:.3g}" for rate in rates)
                yield (
                    f"the {train.lr_scheduler_type} schedule depends on the last step: the rate of step "
                    f"{progress.step + 1} is {new_rate}, where {old} steps had {old_rate}. A run of {new} from the "
                    f"start would have trained the first {progress.step} with other rates, too"
                )
        elif key == "memory.store_dir":
            yield f"{pair}: the store stays where it is"
        elif key == "train.num_train_epochs" and train.max_steps is not None:
            continue
        else:
            yield f"{pair} from step {progress.step + 1} on" if key.startswith("train.") else pair


def _written(folder: RunFolder, progress: TrainerState) -> dict[str, Any]:
    """The settings of a run that an older version trained: those of its config.yaml, if that is of this run."""
    report = last_report(folder.metrics)
    try:
        config = load(folder.config)[0]
    except (MegatrainIoError, OSError):
        return {}
    if report is None or settings_digest(config.train, report.max_steps) != progress.settings:
        return {}
    return recorded_settings(config, report.max_steps)


def _named(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{key} was {_shown(key, old)} and is {_shown(key, new)}"
        for key, (old, new) in sorted(changed.items())
    )


def _shown(key: str, value: Any) -> str:
    """A value as it is written in YAML, sizes with their unit."""
    return mib(value) if key in _SIZES and isinstance(value, int) else json.dumps(value)
