"""The typer application: which commands there are and what ``--help`` teaches."""

from __future__ import annotations

import logging
import warnings
from typing import Annotated

import typer
from typer import Option

from .._version import __version__
from .bench import bench_app
from .check import check
from .errors import one_line_errors
from .evaluate import evaluate, score
from .generate import generate
from .info import info
from .train import train
from .tune import tune_command

app = typer.Typer(
    name="rnnlm-kernels",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fused LSTM and GRU layers for PyTorch.

Use them in a program by changing one name:

    [cyan]import rnnlm_kernels[/cyan]

    [cyan]layer = rnnlm_kernels.LSTM(256, 512)[/cyan]           instead of torch.nn.LSTM

    [cyan]rnnlm_kernels.replace(model)[/cyan]                   swaps those a model has

and this command to see what runs, whether it is right, and how fast it is.""",
    epilog="""First steps:

    [cyan]rnnlm-kernels info[/cyan]      what was built, which kernel a problem gets and why

    [cyan]rnnlm-kernels check[/cyan]     every backend against a float64 oracle, on this machine

    [cyan]rnnlm-kernels bench[/cyan]     speed and memory against torch.nn, under three minutes

    [cyan]rnnlm-kernels tune[/cyan]      measures which kernel is the fastest on your GPU, for later

    [cyan]rnnlm-kernels train[/cyan]     a language model on a text; then eval, score, generate""",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rnnlm-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Show the library's log.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    # torch's word on its own layer, where all that is asked of it is a number to compare with.
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    # The bars and tables are ours to show; a log of a drawing library's fonts is not.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


app.command()(one_line_errors(info))
app.command()(one_line_errors(check))
app.add_typer(bench_app, name="bench")
app.command("tune")(one_line_errors(tune_command))
app.command()(one_line_errors(train))
app.command("eval")(one_line_errors(evaluate))
app.command()(one_line_errors(score))
app.command()(one_line_errors(generate))


def main() -> None:
    """Entry point of the ``rnnlm-kernels`` script and of ``python -m rnnlm_kernels``."""
    app(prog_name="rnnlm-kernels")
