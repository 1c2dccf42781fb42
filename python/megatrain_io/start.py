"""What a run starts from: the model in pieces, its data, and how RAM is divided. All that can be refused is, here."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from megatrain_io.budget import MemoryPlan
from megatrain_io.config import RunConfig
from megatrain_io.data import DataOptions, TrainingData, prepare
from megatrain_io.errors import ConfigError
from megatrain_io.fitting import fit
from megatrain_io.layout import ModelLayout
from megatrain_io.model import CutModel
from megatrain_io.model_folder import ModelFolder
from megatrain_io.probe import probe
from megatrain_io.ram import usable_ram
from megatrain_io.run import RunFolder, replace_file

__all__ = ["Start"]

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The rest is for the libraries, the page cache and other programs.
_SHARE_OF_FREE_RAM = 0.5


@dataclass(frozen=True)
class Start:
    """The model in pieces and its data.

    Attributes:
        config: of the run.
        cut: the model without its parameters.
        tokenizer: the model's.
        data: tokens, and the order of rows.
        max_steps: at which the run ends.
    """

    config: RunConfig
    cut: CutModel
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    max_steps: int

    @classmethod
    def prepare(cls, config: RunConfig, run: RunFolder, model: Path, cut: CutModel | None = None) -> "Start":
        """Read configuration and tokenizer of ``model``, and tokenise the data into ``run``.

        Args:
            config: of the run.
            run: its folder.
            model: folder of the model.
            cut: the same model in pieces, if it was made before.

        Raises:
            MegatrainIoError: model, data or configuration cannot be used.
        """
        if cut is None:
            model_config: PreTrainedConfig = ModelFolder(model).config()
            cut = CutModel(model_config, _DTYPES[config.train.precision], probe(model_config))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, local_files_only=True)
        data = prepare(_data_options(config), tokenizer, run.data, packs=cut.facts.packs)
        largest, vocabulary = data.train.largest_token, cut.config.get_text_config().vocab_size
        if largest >= vocabulary:
            raise ConfigError(
                f"the tokenizer makes token {largest}, and the model knows {vocabulary}: tokenizer and model do not "
                "belong together"
            )
        rows_per_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
        epochs = data.order.steps(config.train.num_train_epochs, rows_per_step)
        return cls(config, cut, tokenizer, data, config.train.max_steps or epochs)

    def divide_ram(self, layout: ModelLayout, tables: int) -> MemoryPlan:
        """What of the budget goes to what.

        Args:
            layout: of the store, which need not be there.
            tables: bytes that it takes when it is open.

        Raises:
            ConfigError: the budget is too small; says what would do.
        """
        config = self.config
        ram = config.memory.ram
        if ram is None:
            ram = int(usable_ram()[0] * _SHARE_OF_FREE_RAM)
        largest = self.data.train.largest_micro_batch(config.train.per_device_train_batch_size)
        steps = [largest] * config.train.gradient_accumulation_steps
        keeps = config.train.max_grad_norm is not None
        return fit(self.cut, layout, steps, tables=tables, ram=ram, keeps=keeps)

    def keep_chat_template(self, model: Path) -> None:
        """The trained model needs the template that it was trained with."""
        if self.data.chat_template is None:
            return
        self.tokenizer.chat_template = self.data.chat_template
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                replace_file(model / file.name, file.read_bytes())


def _data_options(config: RunConfig) -> DataOptions:
    data = config.data
    return DataOptions(
        train=tuple(Path(path) for path in data.train),
        eval=Path(data.eval) if isinstance(data.eval, str) else data.eval,
        format=None if data.format == "auto" else data.format,
        fields=data.fields or {},
        max_length=data.max_length,
        packing=data.packing,
        assistant_only_loss=data.assistant_only_loss,
        chat_template=data.chat_template,
        seed=config.train.seed,
    )
