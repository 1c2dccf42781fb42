"""A run from Python: rows of one's own, a callback of one's own, then evaluating, asking and exporting.

    python trainer.py MODEL RUN

MODEL is a model folder, RUN a folder to be made. Every step is durable; stopped and started again, it goes on.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import megatrain_io as mt

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew"]


def rows() -> Iterator[dict[str, str]]:
    """Texts, each as it would stand in a line of a JSON lines file; a database would do as well."""
    for number in range(20):
        yield {"text": " ".join(WORDS[number % 5 : number % 5 + 3 + number % 7])}


class Best(mt.Callback):
    """Remembers the best held-out loss, and stops the run when that was long ago."""

    def __init__(self, patience: int) -> None:
        self.loss = float("inf")
        self.step = 0
        self._patience = patience

    def on_evaluate(self, run: mt.Run, loss: float) -> None:
        """Stop the run, if nothing has become better for so many steps."""
        if loss < self.loss:
            self.loss, self.step = loss, run.step
        elif run.step - self.step >= self._patience:
            run.stop()


def main(model: Path, run: Path) -> mt.TrainResult:
    """Train, evaluate, ask and export."""
    best = Best(patience=50)
    config = {
        "model": model,
        "output_dir": run,
        "data": {"eval": 0.2, "max_length": 64},
        "train": {
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "eval_steps": 1,
            "per_device_train_batch_size": 2,
        },
        "memory": {"ram": "1GiB"},
    }
    with mt.Trainer(config, callbacks=[mt.reporter(), best], data=rows()) as trainer:
        print(trainer.plan().require_fits())
        result = trainer.train(resume=trainer.folder.is_imported)
        print("held-out loss:", trainer.evaluate(), "- best:", best.loss, "after step", best.step)
        print("the quick brown ->", trainer.generate("the quick brown", max_new_tokens=8))
        print("exported to", trainer.export(run / "trained"))
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
