"""Entry of the ``megatrain-io`` command and of ``python -m megatrain_io``."""

import os

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    # Read by transformers and tokenizers when they are imported: nothing is fetched, nothing is chatty, and no
    # threads are started that a fork would not survive.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megatrain_io.cli.app import app

    app(prog_name="megatrain-io")


if __name__ == "__main__":
    main()
