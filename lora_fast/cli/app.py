"""``lora-fast``: the application that joins the commands."""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    sys.exit("error: the command line needs more packages: pip install 'lora_fast[train]'")

from lora_fast import __version__

from .compare import compare
from .doctor import doctor
from .merge import merge
from .plan import plan
from .train import train
from .tune import tune

EXIT_ERROR = 1

app = typer.Typer(
    name="lora-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(compare)
app.command()(plan)
app.command()(merge)
app.command()(tune)
app.command()(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora_fast {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Fused LoRA and QLoRA fine-tuning, a drop-in for PEFT."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit. Wrong usage is told in one line, without a traceback."""
    try:
        status = app(arguments, prog_name="lora-fast", standalone_mode=False)
    except Exception as error:
        # Usage errors of typer; their class depends on whether typer carries its own click.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if message:  # it is empty when the help was shown instead
            print(f"error: {message}", file=sys.stderr)
        status = getattr(error, "exit_code", EXIT_ERROR)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
