"""Commands about models: import, generate, export."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatrain_io.cli.options import (
    AllowCode,
    BlockList,
    JsonOutput,
    Miniature,
    Model,
    Modules,
    Run,
    allow_code,
)
from megatrain_io.cli.result import command
from megatrain_io.interrupt import check, held
from megatrain_io.text import visible

__all__ = ["export_command", "generate_command", "import_command"]


def import_command(  # noqa: PLR0913 - an option each
    model: Model,
    run: Run,
    *,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option(
            help="Compute dtype: bf16, fp32, or auto, what computes fastest here; master weights are fp32 either way. "
            "A GPU without bf16 (RTX 20, T4) needs fp32."
        ),
    ] = "auto",
    store_dir: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the store, on a local NVMe drive. Once for each of several drives. Default: RUN.",
        ),
    ] = None,
    durability: Annotated[
        Literal["step", "scratch"],
        typer.Option(help="scratch takes half the space, and a crash loses everything."),
    ] = "step",
    io_backend: Annotated[Literal["auto", "uring", "threads"], typer.Option(help="I/O engine.")] = "auto",
    block_list: BlockList = None,
    miniature: Miniature = None,
    attn_implementation: Annotated[
        Literal["sdpa", "eager"] | None,
        typer.Option(help="How attention computes. Default: sdpa where the architecture has it."),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Import fp8 weights with scales by blocks as the numbers that they stand for.",
        ),
    ] = False,
    modules: Modules = None,
    json_output: JsonOutput = False,
) -> None:
    """Make a store from a model folder. It goes tensor by tensor: the model is never whole in RAM."""
    with command(json_output=json_output, interrupted="Nothing was left behind: import again.") as result:
        with held():
            from megatrain_io.config.schema import ModelOptionsConfig
            from megatrain_io.models.model_options import ModelOptions
            from megatrain_io.runs.folder import RunFolder
            from megatrain_io.runs.import_model import import_model
        check()

        folder = RunFolder(run)
        options = ModelOptionsConfig(
            block_list=block_list or None,
            miniature=miniature,
            attn_implementation=attn_implementation,
            dequantize=dequantize,
            modules=modules,
        )
        allow_code(allow_all=False, modules=modules)

        with held(), result.counting("import") as progress:
            info = import_model(
                model,
                folder,
                precision=precision,
                stores=folder.stores_in(store_dir or None),
                durability=durability,
                model_options=ModelOptions.of(options),
                engine=io_backend,
                progress=progress,
            )
        result.values = {"run": run, **asdict(info)}
        result.text = visible(
            f"imported {model} into {run}: {info.precision}, store {', '.join(info.stores)}"
        )


def generate_command(  # noqa: PLR0913 - an option each
    run: Run,
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="TEXT is a message to answer, in the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; higher is more random.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from this many tokens, the likeliest; 0 is off.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    modules: Modules = None,
    allows_code: AllowCode = False,
    json_output: JsonOutput = False,
) -> None:
    """Continue a text, or answer a message, with the newest committed weights."""
    with command(json_output=json_output, interrupted="The run is as it was.") as result:
        with held():
            from megatrain_io.generate import Generator
            from megatrain_io.runs.folder import RunFolder
            from megatrain_io.runs.open_store import naming_the_way_back
        check()

        how: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
        }
        allow_code(allows_code, modules)
        with (
            held(),
            naming_the_way_back(RunFolder(run)),
            Generator.open(run, modules=modules) as generator,
        ):
            if note := generator.asking_note(prompt, chat=chat):
                typer.echo(f"note: {visible(note)}", err=True)
            if chat:
                result.text = generator.chat([{"role": "user", "content": prompt}], **how)
            else:
                result.text = generator.complete(prompt, **how)
        result.values = {"prompt": prompt, "text": result.text, **how}


def export_command(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create; with --to gguf: the file.")],
    *,
    to: Annotated[
        Literal["folder", "gguf"],
        typer.Option(help="gguf: a file for llama.cpp, and a Modelfile for Ollama beside it."),
    ] = "folder",
    dtype: Annotated[
        Literal["bf16", "fp32", "f16", "f32", "q8_0"] | None,
        typer.Option(
            help="fp32 are the master weights. Default: what the run computes in. GGUF: bf16, f16, f32 or q8_0."
        ),
    ] = None,
    modules: Modules = None,
    allows_code: AllowCode = False,
    json_output: JsonOutput = False,
) -> None:
    """Write the weights as a model folder, or as GGUF. They are the newest committed ones."""
    with command(json_output=json_output, interrupted="The run is as it was: export again.") as result:
        with held():
            from megatrain_io.runs.export_gguf import export_gguf
            from megatrain_io.runs.export_model import export_model
            from megatrain_io.runs.folder import RunFolder
            from megatrain_io.runs.open_store import naming_the_way_back
        check()

        folder = RunFolder(run)
        with naming_the_way_back(folder), result.counting("export") as progress:
            allow_code(allows_code, modules)
            if to == "gguf":
                kind: Any = "f32" if dtype == "fp32" else dtype
                export_gguf(folder, out, dtype=kind, progress=progress, modules=modules)
            else:
                precision: Any = dtype
                export_model(folder, out, dtype=precision, progress=progress, modules=modules)
        result.values = {"run": run, "out": out, "dtype": dtype}
        result.text = visible(f"exported {run} to {out}")
