"""What the survey claims, as data: Tables 1 and 2 of its first version, arXiv:2303.15647v1, Table 1 of its
second, v2, and Figure 2 of both.

The chapters put these rows beside their own measurements.  "maybe" stands where the first version has a
footnote: the saving depends on hardware for sparse operations, or on how the weights are pruned.  The second
version prints "no" with a footnote there, or "yes".  Its Table 2 was not to be had for this book.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from guidelib.core.method import expect


@dataclass(frozen=True)
class Row:
    """One method.  kind: A additive, S selective, R reparametrisation-based, or several of them.

    storage, memory: more efficient than full fine-tuning, "yes", "no", "maybe" or "no (footnote)".  backprop:
    whether backpropagation gets cheaper.  overhead: what is added at inference.  trainable, changed: percent
    of the parameters as the survey prints them, None where Table 2 leaves the method out, and in the second
    version.
    """

    method: str
    kind: str
    storage: str
    memory: str
    backprop: str
    overhead: str
    trainable: str | None = None
    changed: str | None = None


TABLE: tuple[Row, ...] = (
    Row("Adapters", "A", "yes", "yes", "no", "extra FFN", "0.1 - 6", "0.1 - 6"),
    Row("AdaMix", "A", "yes", "yes", "no", "extra FFN", "0.1 - 0.2", "0.1 - 0.2"),
    Row("SparseAdapter", "AS", "yes", "yes", "no", "extra FFN", "2.0", "2.0"),
    Row("Cross-Attn tuning", "S", "yes", "yes", "no", "none"),
    Row("BitFit", "S", "yes", "yes", "no", "none", "0.05 - 0.1", "0.05 - 0.1"),
    Row("DiffPruning", "S", "yes", "no", "no", "none", "200", "0.5"),
    Row("Fish-Mask", "S", "yes", "maybe", "no", "none", "0.01 - 0.5", "0.01 - 0.5"),
    Row("LT-SFT", "S", "yes", "maybe", "no", "none"),
    Row("Prompt Tuning", "A", "yes", "yes", "no", "extra input", "0.1", "0.1"),
    Row("Prefix-Tuning", "A", "yes", "yes", "no", "extra input", "0.1 - 4.0", "0.1 - 4.0"),
    Row("Spot", "A", "yes", "yes", "no", "extra input"),
    Row("IPT", "A", "yes", "yes", "no", "extra FFN and input", "56.0", "56.0"),
    Row("MAM Adapter", "A", "yes", "yes", "no", "extra FFN and input", "0.5", "0.5"),
    Row("Parallel Adapter", "A", "yes", "yes", "no", "extra FFN", "0.5", "0.5"),
    Row("Intrinsic SAID", "R", "no", "no", "no", "none", "0.001 - 0.1", "~0.1 or 100"),
    Row("LoRA", "R", "yes", "yes", "no", "none", "0.01 - 0.5", "~0.5 or ~30"),
    Row("UniPELT", "AR", "yes", "yes", "no", "extra FFN and input", "1.0", "1.0"),
    Row("Compacter", "AR", "yes", "yes", "no", "extra FFN", "0.05 - 0.07", "~0.07 or ~0.1"),
    Row("PHM Adapter", "AR", "yes", "yes", "no", "extra FFN", "0.2", "~0.2 or ~1.0"),
    Row("KronA", "R", "yes", "yes", "no", "none", "0.07", "~0.07 or ~30.0"),
    Row("KronA^B_res", "AR", "yes", "yes", "no", "extra linear layer", "0.07", "~0.07 or ~1.0"),
    Row("(IA)^3", "A", "yes", "yes", "no", "extra gating", "0.02", "0.02"),
    Row("Attention Fusion", "A", "yes", "yes", "yes", "extra decoder"),
    Row("LeTS", "A", "yes", "yes", "yes", "extra FFN"),
    Row("Ladder Side-Tuning", "A", "yes", "yes", "yes", "extra decoder", "7.5", "7.5"),
    Row("FAR", "S", "yes", "maybe", "no", "none", "6.6 - 26.4", "6.6 - 26.4"),
    Row("S4-model", "ARS", "yes", "yes", "no", "extra FFN and input", "0.5", "more than 0.5"),
)


# where Table 1 of the second version differs
_CHANGES = {
    "Fish-Mask": {"memory": "no (footnote)"},
    "LT-SFT": {"memory": "no (footnote)"},
    "Intrinsic SAID": {"storage": "yes"},
    "FAR": {"memory": "yes"},
}
_DORA = Row("DoRA", "R", "yes", "yes", "no", "none")
TABLE_2: tuple[Row, ...] = tuple(
    new
    for entry in TABLE
    for new in (
        replace(entry, trainable=None, changed=None, **_CHANGES.get(entry.method, {})),
        *((_DORA,) if entry.method == "LoRA" else ()),
    )
)


def row(method: str, version: int = 1) -> Row:
    """The survey's row of a method, by the name that it prints (LoRA as its paper has it), in its first or
    second version.

    Raises ValueError for another name or version.
    """
    expect(version in (1, 2), "version", version, "1 or 2")
    found = {entry.method: entry for entry in (TABLE if version == 1 else TABLE_2)}
    expect(method in found, "method", method, f"one of {', '.join(found)}")
    return found[method]


def claims(method: str) -> list[tuple[str, str | None, str | None]]:
    """What both versions say of a method: each column, its cell in the first and in the second version, None
    where that version says nothing.  The second version has all rows of the first.

    Raises ValueError for a name that neither has.
    """
    second = row(method, 2)
    first = row(method) if method in {entry.method for entry in TABLE} else None
    columns = {
        "trained, %": "trainable",
        "changed, %": "changed",
        "storage efficient": "storage",
        "memory efficient": "memory",
        "reduces backpropagation": "backprop",
        "overhead at inference": "overhead",
    }
    return [(name, getattr(first, field, None), getattr(second, field)) for name, field in columns.items()]


@dataclass(frozen=True)
class Label:
    """A name in Figure 2.  kind: the circles that it stands in, as in Row.  method: guidelib's class.  page:
    the guide's, below notebooks/.  short: what the guide's map says for it, a line break included, "" if the
    same.  version: the survey's that drew it first; None: neither did.
    """

    name: str
    kind: str
    method: str
    page: str
    short: str = ""
    version: int | None = 1


FIGURE: tuple[Label, ...] = (
    Label("Adapters", "A", "Adapter", "additive/adapters"),
    Label("Parallel Adapters", "A", "ParallelAdapter", "additive/parallel", "Parallel"),
    Label("AdapterDrop", "A", "AdapterDrop", "additive/adapterdrop", version=None),
    Label("AdaMix", "A", "AdaMix", "additive/adamix"),
    Label("AdapterFusion", "A", "AdapterFusion", "additive/fusion", version=None),
    Label("Prompt-tuning", "A", "PromptTuning", "additive/prompt_tuning", "Prompt tuning"),
    Label("Prefix-Tuning", "A", "PrefixTuning", "additive/prefix", "Prefix tuning"),
    Label("WARP", "A", "WARP", "additive/warp"),
    Label("Spot", "A", "SPoT", "additive/spot", "SPoT"),
    Label("IPT", "A", "IPT", "additive/ipt"),
    Label("P-tuning", "A", "PTuning", "additive/p_tuning", version=2),
    Label("Late prompts", "A", "LatePromptTuning", "additive/late_prompts", version=None),
    Label("(IA)^3", "A", "IA3", "additive/ia3", "(IA)³"),
    Label("Ladder-Side Tuning", "A", "LST", "additive/lst", "LST"),
    Label("AttentionFusion", "A", "AttentionFusion", "additive/attention_fusion", "Attention Fusion"),
    Label("LeTS", "A", "LeTS", "additive/lets"),
    Label("MAM Adapter", "A", "MAM", "hybrid/mam", "MAM"),
    Label("BitFit", "S", "BitFit", "selective/bitfit"),
    Label("LN Tuning", "S", "NormTuning", "selective/norms", "Norm tuning"),
    Label("Attention Tuning", "S", "CrossAttentionTuning", "selective/cross_attention", "Cross-attention"),
    Label("Diff-Pruning", "S", "DiffPruning", "selective/diff_pruning", "DiffPruning"),
    Label("Fish-Mask", "S", "FishMask", "selective/fish_mask", "FishMask"),
    Label("LT-SFT", "S", "LTSFT", "selective/lt_sft"),
    Label("FAR", "S", "FAR", "selective/far"),
    Label("LoRa", "R", "LoRA", "reparametrization/lora", "LoRA"),
    Label("DoRA", "R", "DoRA", "reparametrization/dora", version=None),  # but in the second version's table
    Label("AdaLoRA", "R", "AdaLoRA", "reparametrization/adalora", version=None),
    Label("GLoRA", "R", "GLoRA", "reparametrization/glora", version=None),
    Label("ReLoRa", "R", "ReLoRA", "reparametrization/relora", "ReLoRA", 2),
    Label("QLoRa", "R", "QLoRA", "reparametrization/qlora", "QLoRA", 2),
    Label("fLoRa", "R", "FLoRA", "reparametrization/flora", "FLoRA", 2),
    Label("KronA", "R", "KronA", "reparametrization/krona"),
    Label("Intrinsic-SAID", "R", "IntrinsicSAID", "reparametrization/said", "SAID"),
    Label("UniPELT", "AR", "UniPELT", "hybrid/unipelt"),
    Label("Compacter", "AR", "Compacter", "hybrid/compacter"),
    Label("PHM Adapter", "AR", "PHMAdapter", "hybrid/compacter", "PHM adapter"),
    Label("KronA^B_res", "AR", "KronARes", "hybrid/krona_res", "KronA-res"),
    Label("SparseAdapter", "AS", "SparseAdapter", "hybrid/sparse_adapter", "Sparse-\nAdapter"),
    Label("Sparse LoRa", "SR", "SparseLoRA", "hybrid/sparse_adapter", "Sparse\nLoRA"),
    Label("S4", "ASR", "S4", "hybrid/s4"),
)
