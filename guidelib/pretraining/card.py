"""The card of ``tiny-t5``, from the facts that its training stored and the comparisons that were run with it.

``python -m guidelib.pretraining.card book/tiny-t5.md`` writes it into that page, and the curve of its losses
beside the page.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from guidelib.experiments import best_runs, experiment, load_results
from guidelib.materials.cards import put
from guidelib.materials.checkpoints import tiny_t5_folder
from guidelib.pages import viz
from guidelib.pretraining.corpus import AUSTEN, KJV, WEB, WORDNET

CURVE = "tiny-t5-losses.svg"
LOSSES = {
    "copy": "the text itself",
    "fill": "the text, from one with gaps",
    "repair": "the text, from one with wrong, missing and added tokens",
    "spans": "what stood in the gaps, with the numbers of the gaps",
    "hidden": "the same, without the numbers",
}
TITLES = {
    "king_james": ("King James Version without the Gospels", KJV, "(kept: the verse is its book's own)"),
    "world_english": ("World English Bible without the Gospels", WEB, "(kept)"),
    "glosses": ("WordNet's glosses", WORDNET, "(left out)"),
    "austen": ("Jane Austen's six novels", AUSTEN, "(left out)"),
}
CURVES = {"fill": "text with gaps", "repair": "text with errors", "hidden": "the gaps alone", "copy": "copy"}
FULL = "full fine-tuning"
ARMS = (
    ("`tiny-t5` as it is, which copies", "tiny-t5", "no tuning"),
    ("`tiny-t5`, fine-tuned", "tiny-t5", FULL),
    ("random weights, fine-tuned the same way", "tiny-t5-untrained", FULL),
)


def model_card() -> str:
    """The card in Markdown."""
    folder = tiny_t5_folder()
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    plan, corpus, tokens = facts["plan"], facts["corpus"], facts["tokens"]
    made_with = ", ".join(f"{k} {facts['versions'][k]}" for k in ("torch", "transformers", "tokenizers"))
    size = (folder / "model.safetensors").stat().st_size
    text = {name: corpus[f"{name}_characters"] / 1e6 for name in TITLES}
    lines = [
        "| fact | value |",
        "|---|---|",
        f"| Parameters | {facts['parameters']:,} in float32, {size / 1e6:.1f} MB |",
        f"| Vocabulary | {plan['vocabulary']:,} tokens (byte pairs), of them 32 for gaps |",
        f"| Text | {corpus['train']:,} tokens, and {corpus['held_out']:,} held out |",
        f"| Training | {facts['steps']:,} steps; {tokens['text'] / 1e6:.1f} million tokens of text: "
        f"{tokens['source'] / 1e6:.1f} million read, {tokens['target'] / 1e6:.1f} million predicted |",
        f"| Time | {facts['hours']:.1f} hours on one thread of a shared processor |",
        f"| Made with | {made_with}; seed {plan['seed']} |",
        f"| SHA-256 of the text | `{corpus['sha256']}` |",
        "",
        "| text | million characters | units | with a quotation of a Gospel | package and its SHA-256 |",
        "|---|---:|---:|---|---|",
    ]
    for name, (title, source, what) in TITLES.items():
        units, quoting = corpus[f"{name}_units"], corpus[f"{name}_quoting"]
        package = f"`{source.package}` `{source.sha256}`"
        lines.append(f"| {title} | {text[name]:.1f} | {units:,} | {quoting} {what} | {package} |")
    lines += [
        "",
        "| held-out loss per token (natural logarithm) | random weights | trained |",
        "|---|---:|---:|",
    ]
    for name, title in LOSSES.items():
        lines.append(f"| {title} | {facts['random_weights'][name]:.2f} | {facts['held_out'][name]:.2f} |")
    lines += [
        "",
        f"A model that knows only how frequent each token is has a loss of {facts['unigram']:.2f}: "
        "compare that with the last line.",
    ]
    return "\n".join(lines + evidence())


def draw_curve(path: Path) -> None:
    """Draw the held-out losses over the training, from its log, as an SVG file."""
    log = (tiny_t5_folder() / "pretraining.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in log if "held_out" in (record := json.loads(line))]
    with viz.style():
        figure, ax = plt.subplots()
        for (name, label), marker in zip(CURVES.items(), "osD^", strict=True):
            tokens = [record.get("tokens", 0) / 1e6 for record in records]
            ax.plot(tokens, [r["held_out"][name] for r in records], marker=marker, markersize=4, label=label)
        ax.axhline(records[0]["unigram"], color=viz.COLOURS["head"], linestyle=":", label="token frequencies")
        ax.set(xlabel="million tokens of text read", ylabel="held-out loss per token", ylim=(0, None))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def evidence() -> list[str]:
    """What the pretraining is worth on the task `modern-bible`."""
    results = {name: load_results(name) for name in ("tiny-t5", "tiny-t5-untrained")}
    plan = experiment("tiny-t5")
    (setting,) = plan.tasks.values()
    lines = [
        "",
        f"Fine-tuned on {setting.train:,} verses of `modern-bible`, {setting.epochs:g} epoch, "
        f"with {plan.seeds} seeds: mean ± standard deviation on {setting.test:,} verses of Matthew, Luke and "
        "John. The learning rate was chosen on Mark.",
        "",
        "| | learning rate | chrF | changed words: precision | recall | F1 | verses exactly right |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, name, label in ARMS:
        runs = best_runs(results[name], label)
        scores = [run["test"] for run in runs]
        cells = [_cell([s["chrf"] for s in scores])]
        cells += [_cell([100 * s[key] for s in scores]) for key in ("precision", "recall", "f1", "exact")]
        lines.append(f"| {title} | {runs[0]['lr'] or ''} | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main(page: str) -> None:
    """Write the card between its two comments in a page, and the curve beside it."""
    put(Path(page), {"card: tiny-t5": model_card()})
    draw_curve(Path(page).with_name(CURVE))


if __name__ == "__main__":
    main(sys.argv[1])
