"""guidelib - the support library of *Scaling Down to Scale Up, the executable guide*.

Every method of the survey arXiv:2303.15647, from scratch, on transformers models.  Start with
``load_backbone``, ``attach`` and ``fit``.  Names are imported when they are first used, so that ``import
guidelib`` is fast.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "guidelib.additive.adapters.adamix": ("AdaMix",),
    "guidelib.additive.adapters.bottleneck": ("Adapter", "ParallelAdapter", "PfeifferAdapter"),
    "guidelib.additive.adapters.drop": ("AdapterDrop",),
    "guidelib.additive.adapters.fusion": ("AdapterFusion",),
    "guidelib.additive.adapters.linear": ("Dense",),
    "guidelib.additive.other.attention_fusion": ("AttentionFusion",),
    "guidelib.additive.other.ia3": ("IA3",),
    "guidelib.additive.other.lets": ("LeTS",),
    "guidelib.additive.other.lst": ("LST",),
    "guidelib.additive.soft_prompts.ipt": ("IPT", "PromptSpace", "fit_space"),
    "guidelib.additive.soft_prompts.late": ("LatePromptTuning",),
    "guidelib.additive.soft_prompts.p_tuning": ("PTuning",),
    "guidelib.additive.soft_prompts.prefix": ("PrefixTuning",),
    "guidelib.additive.soft_prompts.prompt": ("PromptTuning",),
    "guidelib.additive.soft_prompts.spot": ("SPoT", "prompt_similarity"),
    "guidelib.additive.soft_prompts.warp": ("WARP",),
    "guidelib.hybrid.compacter": ("PHM", "PHMAdapter", "Compacter", "CompacterPlusPlus"),
    "guidelib.hybrid.krona_res": ("KronARes",),
    "guidelib.hybrid.mam": ("MAM",),
    "guidelib.hybrid.unipelt": ("UniPELT",),
    "guidelib.hybrid.sparse": ("Sparse",),
    "guidelib.hybrid.sparse_adapter": ("SparseAdapter", "SparseLoRA"),
    "guidelib.hybrid.s4": ("S4",),
    "guidelib.materials.backbones": ("load_backbone",),
    "guidelib.costs.measure": ("Costs", "measure"),
    "guidelib.costs.plan": ("memory_plan",),
    "guidelib.costs.predict": ("predict",),
    "guidelib.machine": ("device", "versions"),
    "guidelib.pages.diagrams": ("Diagram",),
    "guidelib.pages.environment": ("require", "setup"),
    "guidelib.pages.exercises": ("check", "hint"),
    "guidelib.pages.finding": ("finding",),
    "guidelib.pages.listing": ("show_source",),
    "guidelib.pages.places": ("place",),
    "guidelib.pages.prices": ("cost_table", "count", "survey_table", "token_batch"),
    "guidelib.pages.recording": ("recording",),
    "guidelib.pages.results": ("rate_figure", "verdict_figure", "verdict_table"),
    "guidelib.pages.viz": ("panel", "slider", "style", "table"),
    "guidelib.core.attaching": ("Attachment", "Count", "attach", "attached", "load", "using"),
    "guidelib.core.points.gate": ("Gated",),
    "guidelib.core.method": ("Expression", "Method", "On", "Plan", "Sum"),
    "guidelib.reparametrization.adalora": ("AdaLoRA",),
    "guidelib.reparametrization.flora": ("FLoRA", "load_loras"),
    "guidelib.reparametrization.krona": ("KronA",),
    "guidelib.reparametrization.dora": ("DoRA",),
    "guidelib.reparametrization.glora": ("GLoRA",),
    "guidelib.reparametrization.lora": ("LoRA",),
    "guidelib.reparametrization.nf4": ("NF4",),
    "guidelib.reparametrization.qlora": ("QLoRA",),
    "guidelib.reparametrization.relora": ("ReLoRA",),
    "guidelib.reparametrization.said": ("IntrinsicSAID",),
    "guidelib.selective.anchors": ("FullFineTuning", "HeadOnly"),
    "guidelib.selective.attention": ("CrossAttentionTuning",),
    "guidelib.selective.bitfit": ("BitFit",),
    "guidelib.selective.diff_pruning": ("DiffPruning",),
    "guidelib.selective.far": ("FAR",),
    "guidelib.selective.fish_mask": ("FishMask",),
    "guidelib.selective.lt_sft": ("LTSFT", "load_deltas"),
    "guidelib.selective.norms": ("NormTuning",),
    "guidelib.materials.tasks": ("Task", "load_task"),
    "guidelib.training.checkpointing": ("checkpointing",),
    "guidelib.training.fit": ("evaluate", "fit"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_SHORT = {  # modules that pages use often, by their last name
    module.rsplit(".", 1)[-1]: module
    for module in (
        "guidelib.core.anatomy",
        "guidelib.core.method",
        "guidelib.costs.closed_form",
        "guidelib.pages.viz",
        "guidelib.training.recompute",
        "guidelib.training.text2text",
    )
}

METHODS = {  # by the survey's classes; the anchors belong to none
    "anchors": ("FullFineTuning", "HeadOnly"),
    "adapters": (
        "Adapter",
        "PfeifferAdapter",
        "ParallelAdapter",
        "AdapterFusion",
        "AdapterDrop",
        "AdaMix",
    ),
    "soft prompts": ("PromptTuning", "WARP", "PTuning", "SPoT", "PrefixTuning", "IPT", "LatePromptTuning"),
    "other additive": ("IA3", "LST", "AttentionFusion", "LeTS"),
    "selective": (
        *("BitFit", "NormTuning", "CrossAttentionTuning"),
        *("FishMask", "LTSFT", "DiffPruning", "FAR"),
    ),
    "reparametrization": (
        *("LoRA", "AdaLoRA", "DoRA", "GLoRA", "ReLoRA", "QLoRA", "FLoRA", "KronA", "IntrinsicSAID"),
    ),
    "hybrid": (
        "PHMAdapter",
        "Compacter",
        "CompacterPlusPlus",
        "KronARes",
        "MAM",
        "UniPELT",
        "SparseAdapter",
        "SparseLoRA",
        "S4",
    ),
}

__all__ = [*sorted(_HOME), "METHODS"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    try:
        return importlib.import_module(_SHORT.get(name, f"guidelib.{name}"))  # a module, as in guidelib.costs
    except ModuleNotFoundError as error:
        if error.name != f"guidelib.{name}":
            raise  # the module is there, but something that it needs is not installed
        raise AttributeError(f"guidelib has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
