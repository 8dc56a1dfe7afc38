"""Text to text: what a model writes, and three ways to score it.

``generate`` writes, ``score`` compares with the references: chrF (Popović 2015), exact matches, and the
words that were rightly changed.  Copying the source is a strong answer where source and target differ in a
few words, and chrF rewards it.  It changes nothing, so the last score of it is 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guidelib.core.method import expect, is_whole
from guidelib.core.modes import modes_kept


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 64,
    num_beams: int = 1,
) -> list[str]:
    """What an encoder-decoder writes for each source, in order: greedily, or with ``num_beams`` beams.

    max_length: tokens read of each source, and written at most.  Texts of similar length share a batch.
    Raises TypeError for a model that is not an encoder-decoder, ValueError for an impossible number, or one
    text in place of several.
    """
    if not model.config.is_encoder_decoder:
        raise TypeError(
            f"model: a {model.config.model_type} model is given, but an encoder-decoder is accepted"
        )
    for name, value in (("max_length", max_length), ("batch_size", batch_size), ("num_beams", num_beams)):
        expect(is_whole(value), name, value, "a whole number of at least 1")
    expect(not isinstance(sources, str), "sources", sources, "a list of texts")
    written = [""] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    cut = {"truncation": True, "max_length": max_length}
    with modes_kept(model):
        model.eval()
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            inputs = tokenizer([sources[i] for i in chosen], **cut, padding=True, return_tensors="pt")
            ids = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=max_length,
                num_beams=num_beams,
                do_sample=False,
            )
            for i, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                written[i] = text
    return written


def score(outputs: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> dict[str, float]:
    """chrF (0 to 100), and as shares: exact matches, and precision, recall and F1 of the changed words.

    A word of a text is *new* if the alignment with the source (`difflib.SequenceMatcher`) has it inside a
    replacement or an insertion.  A new word of an output is right if the reference has the same new word
    in the same place, which means for an overlapping or adjoining stretch of the source; each word of the
    reference is found once.  Precision: right words among the output's new words.  Recall: right words
    among the reference's new words.  Case and punctuation do not count.

    Raises ModuleNotFoundError without sacrebleu, ValueError if the numbers of texts differ or are 0.
    """
    expect(
        len(outputs) == len(references) == len(sources) > 0,
        "outputs",
        f"{len(outputs)} texts for {len(references)} references and {len(sources)} sources",
        "one output and one reference for each source, and at least one",
    )
    chrf = _chrf()
    right = given = wanted = 0
    for output, reference, source in zip(outputs, references, sources, strict=True):
        ours, theirs = new_words(source, output), new_words(source, reference)
        given, wanted = given + len(ours), wanted + len(theirs)
        for word, start, end in ours:
            for other in theirs:
                if other[0] == word and other[1] <= end and start <= other[2]:
                    theirs.remove(other)
                    right += 1
                    break
    return {
        "chrf": chrf.corpus_score(list(outputs), [list(references)]).score,
        "exact": sum(o == r for o, r in zip(outputs, references, strict=True)) / len(outputs),
        "precision": right / given if given else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "f1": 2 * right / (given + wanted) if given + wanted else 0.0,
    }


def chrf_of_each(outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The chrF (0 to 100) of each output alone.  Raises ModuleNotFoundError without sacrebleu, ValueError if
    the numbers of texts differ."""
    chrf = _chrf()
    return np.array([chrf.sentence_score(o, [r]).score for o, r in zip(outputs, references, strict=True)])


def _chrf():
    try:
        from sacrebleu.metrics import CHRF
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("chrF needs the package sacrebleu; run `pip install sacrebleu`") from error
    return CHRF()


def new_words(source: str, text: str) -> list[tuple[str, int, int]]:
    """The words of ``text`` that the source does not have there, each with the words of the source (from, to)
    whose place it takes."""
    before, after = (re.findall(r"\w+(?:['’]\w+)*", t.lower()) for t in (source, text))
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    return [
        (word, i1, i2)
        for kind, i1, i2, j1, j2 in matcher.get_opcodes()
        if kind in ("replace", "insert")
        for word in after[j1:j2]
    ]
