"""``lora-fast``: the application that joins the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    sys.exit("error: the command line needs more packages: pip install 'lora_fast[train]'")

from .. import __version__
from .compare import compare
from .doctor import doctor
from .errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, one_line
from .help import Command, Commands
from .merge import merge
from .plan import plan
from .streams import prepare_streams
from .train import train
from .tune import tune

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="lora-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=Commands,
    context_settings=HELP,
)
SUMMARIES: dict[Callable[..., None], str] = {
    train: "Fine-tune a model.",
    compare: "Train every method on the same data.",
    plan: "Memory that a run needs.",
    merge: "Merge an adapter into its base.",
    tune: "Find the fastest kernels for this GPU.",
    doctor: "Check the installation.",
}
for command, summary in SUMMARIES.items():
    app.command(cls=Command, short_help=summary, context_settings=HELP)(command)


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
    """Run the command line and exit. Wrong usage ends with one line, without a traceback."""
    prepare_streams()
    words = sys.argv[1:] if arguments is None else arguments
    wrong = wrong_word(words)
    if wrong is not None:
        print(one_line(f"error: {wrong}"), file=sys.stderr)
        sys.exit(EXIT_USAGE)
    try:
        status = app(words, prog_name="lora-fast", standalone_mode=False)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except Exception as error:
        # Usage errors of typer; their class depends on whether typer carries its own click.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
        elif message:
            line = " ".join(message.split())
            if line.startswith("Got unexpected extra argument"):
                line += ": a value follows its option, as in --out FOLDER; see --help"
            print(one_line(f"error: {line}"), file=sys.stderr)
        status = getattr(error, "exit_code", EXIT_ERROR)
    sys.exit(status if isinstance(status, int) else 0)


def wrong_word(words: list[str]) -> str | None:
    """What is wrong with a value, whatever its option: it is empty, or has several lines.

    An empty value means an unset variable of a script, never a default. None if the value is fine.
    """
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not (word.startswith("--") and equals):
            before = words[index - 1] if index else ""
            name, value = before if before.startswith("-") else "an argument", word
        if not value.strip():
            return f"{name} must not be empty"
        if len(value.splitlines()) > 1:
            return f"{name} must be one line, got {value!r}"
    return None


if __name__ == "__main__":
    main()
