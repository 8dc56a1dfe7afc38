"""The rows that ``tiny-t5`` is trained on: tokenizer, text cut into rows and batches, objectives.

Three ways to spoil a text, one per row, drawn for each step from the seed and the step's number:

    fill      spans of the text become <extra_id_31> each; the target is the whole text (as in BART)
    repair    words' pieces are dropped, replaced or doubled; the target is the whole text
    spans     each span becomes a sentinel of its own; the target is the sentinels with their spans (as in T5)

With ``spans`` alone, a model of this size does not learn to copy, and without copying it is no use for
rewriting.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from guidelib.core.method import expect

SENTINELS = tuple(f"<extra_id_{i}>" for i in range(32))
PAD, END = 0, 1  # then comes <unk>
FIRST = 3  # id of <extra_id_0>; the pieces follow after the last
MASK = FIRST + len(SENTINELS) - 1
OBJECTIVES = ("fill", "repair", "spans", "copy")


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with T5's special tokens; the same texts give the same file.

    T5 has a unigram tokenizer.  Training one here takes ten times as long, needs more tokens for the same
    text, and gives another file each time.  Raises ValueError if ``vocabulary`` is not reached.
    """
    special = ["<pad>", "</s>", "<unk>", *SENTINELS]
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    core.train_from_iterator(texts, trainer)
    expect(
        core.get_vocab_size() == vocabulary, "vocabulary", vocabulary, "a size that the text has pieces for"
    )
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SENTINELS),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


class Text:
    """Units of text as one array of ids, cut into rows and batches anew in each epoch."""

    def __init__(self, units: Sequence[str], tokenizer: PreTrainedTokenizerFast):
        encoded = tokenizer(list(units), add_special_tokens=False, verbose=False)["input_ids"]
        self.ids = np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded])
        self.ends = np.cumsum([len(ids) for ids in encoded])
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        starts_word = np.array([piece.startswith("▁") for piece in pieces])
        self.starts = starts_word[self.ids]

    def rows(self, length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """(start, end) of each row: whole units up to a length that is drawn, or a part of a long one."""
        rows, at, unit = [], 0, 0
        targets = rng.integers(length // 4, length + 1, size=4096)
        while at < len(self.ids):
            limit = at + int(targets[len(rows) % len(targets)])
            end = int(self.ends[unit])
            if end - at > length:  # cut before a word
                end = at + length
                while end > at + 1 and not self.starts[end]:
                    end -= 1
            else:
                unit += 1
                while unit < len(self.ends) and self.ends[unit] <= min(limit, at + length):
                    end = int(self.ends[unit])
                    unit += 1
            rows.append((at, end))
            at = end
        return rows

    def batches(self, batch: int, length: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
        """The rows of an epoch in batches of similar length, in random order."""
        rows = self.rows(length, rng)
        order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: rows[i][1] - rows[i][0])
        batches, current = [], []
        for i in order:
            longest = rows[i][1] - rows[i][0]
            if current and (len(current) + 1) * longest > batch:
                batches.append(current)
                current = []
            current.append(rows[i])
        batches.append(current)
        return [batches[i] for i in rng.permutation(len(batches))]


def spans(n: int, rate: float, mean: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Separate spans of n positions, about ``rate`` n of them, each of ``mean`` positions on average."""
    masked = max(1, round(rate * n))
    count = max(1, min(round(masked / mean), len(SENTINELS) - 1, n - masked + 1))
    cuts = np.sort(rng.permutation(masked - 1)[: count - 1]) + 1 if count > 1 else np.array([], dtype=int)
    lengths = np.diff([0, *cuts, masked])
    gaps = np.sort(rng.permutation(n - masked + 1)[: len(lengths)])
    starts = gaps + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return [(int(s), int(s + k)) for s, k in zip(starts, lengths, strict=True)]


def spoil(ids: np.ndarray, objective: str, pieces: np.ndarray, rng: np.random.Generator) -> tuple[list, list]:
    """Input and target of one text, without the end token.  pieces: where replacements are drawn from."""
    target = ids.tolist()
    if objective == "copy":
        return target, target
    if objective == "repair":
        fate, other = rng.random(len(ids)), rng.choice(pieces, size=len(ids))
        source = []
        for token, luck, wrong in zip(target, fate, other.tolist(), strict=True):
            if luck < 0.06:
                continue
            source += [wrong] if luck < 0.12 else [token, wrong] if luck < 0.14 else [token]
        return source, target
    if objective == "fill":
        chosen = spans(len(ids), rng.uniform(0.05, 0.3), 2.0, rng)
        marks = [MASK] * len(chosen)
    else:
        chosen = spans(len(ids), 0.15, 2.5, rng)
        marks = [FIRST + i for i in range(len(chosen))]
    source, hidden, at = [], [], 0
    for (start, end), mark in zip(chosen, marks, strict=True):
        source += [*target[at:start], mark]
        hidden += [mark, *target[start:end]]
        at = end
    return source + target[at:], target if objective == "fill" else hidden


def collate(pairs: list[tuple[list, list]]) -> dict[str, torch.Tensor]:
    """Input ids, mask and labels, each with the end token, padded with 0 or -100."""
    sources, targets = ([[*row, END] for row in side] for side in zip(*pairs, strict=True))
    input_ids = torch.full((len(pairs), max(map(len, sources))), PAD)
    labels = torch.full((len(pairs), max(map(len, targets))), -100)
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        input_ids[i, : len(source)] = torch.tensor(source)
        labels[i, : len(target)] = torch.tensor(target)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}
