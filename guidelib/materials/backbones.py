"""Backbones: three really pretrained models that load without a network, and tiny random ones for tests.

    minilm     all-MiniLM-L6-v2: BERT, 6 layers, d = 384, 22.7 M parameters
    smollm2    SmolLM2-135M-Instruct: LLaMA-like decoder, 30 layers, d = 576, 134.5 M parameters
    tiny-t5    this project's own: T5 v1.1, 4 + 4 layers, d = 128, 2.5 M parameters
    tiny-t5-untrained   the same with random weights: what pretraining is worth is the difference
    tiny-...   random weights: 2 layers, d = 32, 4 heads of 8, a byte vocabulary

Any other name with a "/" is a hub id, or a folder.  Only safetensors are read, and no remote code runs.
"""

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from guidelib.materials.checkpoints import minilm_folder, no_progress_bars, smollm2_folder, tiny_t5_folder
from guidelib.materials.configs import TINY, architecture, expect_name, unreachable
from guidelib.materials.tasks import Task, load_task


def load_backbone(
    name: str = "minilm", task: Task | str | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A backbone in evaluation mode, and its tokenizer, which always has a padding token.

    Without ``task``, an encoder is bare (no pooler) and a decoder or encoder-decoder has its language-model
    head.  With a classification task, an encoder becomes a `MeanPoolClassifier` and a decoder gets
    transformers' classification head on the last token, which starts from words if the task names answers
    (`Task.ask`).  ``seed`` draws a head, and the weights of the ``tiny-*`` models; torch's global random
    state stays as it was.

    ``minilm`` comes from an installed package, else from the hub: the same files, checked against the same
    hashes.  ``smollm2`` comes from a package with 4-bit weights, converted once to bfloat16 in
    ``$GUIDELIB_CACHE`` (default ``~/.cache/guidelib``).  They are *not* the weights of
    HuggingFaceTB/SmolLM2-135M-Instruct; pass that id for those.  ``tiny-t5`` is part of guidelib: see
    book/tiny-t5.md.

    Raises ValueError for an unknown name, a type or seed that is none, a wrong hash or answers that begin
    alike, ModuleNotFoundError for a missing package, OSError for a hub id that cannot be loaded,
    NotImplementedError for a model that cannot be given the task.
    """
    task = _task(task)
    expect_name(name)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: got {dtype!r}, but a type such as torch.bfloat16 is accepted")
    if type(seed) is not int:
        raise ValueError(f"seed: got {seed!r}, but a whole number is accepted")
    model, tokenizer = _NAMED[name](seed, dtype) if name in _NAMED else _hub(name, dtype)
    if task is not None:
        model = _with_head(model, task, seed, tokenizer)
    return model.eval(), tokenizer


def blank_backbone(
    config: PreTrainedConfig, task: Task | str | None = None, *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model that `load_backbone` makes of this configuration, with weights that mean nothing.

    Made on torch's meta device or within its FakeTensorMode it takes no memory.  Of ``task`` only the kind
    and the labels matter; without one an encoder gets the classification head as well, with as many labels
    as ``config`` says.  Raises NotImplementedError as `load_backbone` does.
    """
    config, task = copy.deepcopy(config), _task(task)
    kind, model_class, _ = architecture(config)
    if kind == "encoder":
        model_class = MeanPoolClassifier
    for token in ("pad_token_id", "decoder_start_token_id"):  # a tokenizer's; which one it is does not matter
        if getattr(config, token, None) is None:
            setattr(config, token, 0)
    if task is not None and _needs_head(config, kind, task):
        _set_labels(config, task)
        if kind == "decoder":
            model_class = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return model_class._from_config(config, dtype=dtype)


def _task(task: Task | str | None) -> Task | None:
    task = load_task(task) if isinstance(task, str) else task
    if not isinstance(task, Task | None):
        raise TypeError(f"task: got a {type(task).__name__}, but a Task, a task's name or None is accepted")
    return task


class MeanPoolClassifier(PreTrainedModel):
    """An encoder, the mean of its last hidden states over the unmasked tokens, dropout, and one linear map.

    The usual BERT head reads the first token through a pooler.  ``minilm`` was trained on the mean and
    never used its pooler, so the mean is where its knowledge is.

    ``config`` is the encoder's own, with ``num_labels``.  Without ``encoder``, a new one is built from
    ``config``.
    """

    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean, so the Trainer has to average accumulated steps
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        _, encoder_class, options = architecture(config)
        self.encoder = encoder_class(config, **options) if encoder is None else encoder
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", getattr(config, "dropout", 0.0)))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike | None, *args: Any, config: Any = None, **kwargs: Any):
        """As in transformers.  The configuration class is the encoder's, so it is found from the file."""
        if not isinstance(config, PreTrainedConfig):
            where = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
            config = AutoConfig.from_pretrained(
                path if config is None else config, **{key: kwargs[key] for key in where if key in kwargs}
            )
        return super().from_pretrained(path, *args, config=config, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Ids (B, T) or embeddings (B, T, d) -> logits (B, C); with labels (B,), their mean cross-entropy."""
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids  # some encoders take none
        output = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden = output.last_hidden_state  # (B, T, d)
        if attention_mask is None:
            mean = hidden.mean(1)
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (B, T, 1)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits = self.classifier(self.dropout(mean))  # (B, C)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits, output.hidden_states, output.attentions)


def _with_head(
    model: PreTrainedModel, task: Task, seed: int, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    config, (kind, *_) = model.config, architecture(model.config)
    if not _needs_head(config, kind, task):
        return model
    _set_labels(config, task)
    with _seeded(seed), no_progress_bars():
        if kind == "encoder":
            return MeanPoolClassifier(config, model).to(model.dtype)
        # With the new weights in the state dict nothing is missing, so there is nothing to warn about.
        if task.answers:
            first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in task.answers]
            if len(set(first)) < len(first):
                raise ValueError(
                    f"answers: got {task.answers}, but words that begin with different tokens are accepted"
                )
            score = model.get_output_embeddings().weight[first].detach().clone()
        else:
            score = torch.empty(config.num_labels, config.hidden_size).normal_(0, config.initializer_range)
        state = {key: value for key, value in model.state_dict().items() if not key.startswith("lm_head.")}
        return transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state | {"score.weight": score}, dtype=model.dtype
        )


def _needs_head(config: PreTrainedConfig, kind: str, task: Task) -> bool:
    """Raise NotImplementedError if the model cannot be given the task; does it need a new head for it?"""
    if task.kind == "text2text" and kind == "encoder-decoder":
        return False  # its head is the one it has
    if task.kind != "classification" or kind == "encoder-decoder":
        raise NotImplementedError(
            f"task: the {kind} {config.model_type} cannot be given the {task.kind} task {task.name!r}; "
            "classification with an encoder or a decoder, text2text with an encoder-decoder, or task=None is "
            "accepted"
        )
    if kind == "decoder" and type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise NotImplementedError(
            f"task: transformers has no classifier for {config.model_type}; task=None is accepted"
        )
    return True


def _set_labels(config: PreTrainedConfig, task: Task) -> None:
    config.id2label = dict(enumerate(task.labels))  # this sets num_labels, too
    config.label2id = {label: index for index, label in enumerate(task.labels)}


def _minilm(seed: int, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = minilm_folder()
    state = load_file(folder / "model.safetensors")
    for key in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"):
        del state[key]  # a pooler that was never used, and a buffer that is no longer stored
    config = AutoConfig.from_pretrained(folder)
    with no_progress_bars():
        model = transformers.BertModel.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, add_pooling_layer=False
        )
    return model, AutoTokenizer.from_pretrained(folder)


def _smollm2(seed: int, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = smollm2_folder()
    with no_progress_bars():
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(folder)


def _tiny_t5(
    seed: int, dtype: torch.dtype, untrained: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = tiny_t5_folder()
    if untrained:
        with _seeded(seed):
            model = transformers.T5ForConditionalGeneration(AutoConfig.from_pretrained(folder))
        return model.to(dtype), AutoTokenizer.from_pretrained(folder)
    with no_progress_bars():
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True
        )
    return model, AutoTokenizer.from_pretrained(folder)


def _hub(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind, model_class, options = architecture(config)
        with no_progress_bars():
            model = model_class.from_pretrained(
                name, config=config, dtype=dtype, use_safetensors=True, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise unreachable(name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if kind == "decoder":
        model.config.pad_token_id = tokenizer.pad_token_id  # by it a head finds the last token of a text
    return model, tokenizer


def _tiny(name: str, seed: int, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = AutoConfig.for_model(**TINY[name])
    _, model_class, options = architecture(config)
    with _seeded(seed):
        model = model_class(config, **options)
    return model.to(dtype), transformers.ByT5Tokenizer(model_max_length=256)


_NAMED = (
    {"minilm": _minilm, "smollm2": _smollm2, "tiny-t5": _tiny_t5}
    | {"tiny-t5-untrained": functools.partial(_tiny_t5, untrained=True)}
    | {name: functools.partial(_tiny, name) for name in TINY}
)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        yield
