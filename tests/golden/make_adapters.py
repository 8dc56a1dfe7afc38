"""Golden tensors of AdapterHub's library, for tests/test_adapters.py, tests/test_hybrid.py and
tests/test_soft_prompts.py.

That library pins an older transformers, so it has an environment of its own:

    python3 -m venv golden-env
    golden-env/bin/pip install adapters==1.3.0 transformers==4.57.6 torch==2.13.0 safetensors
    golden-env/bin/python tests/golden/make_adapters.py

The file holds a tiny BERT and, for each configuration, the adapters' tensors under AdapterHub's names
(`<name>/value/<tensor>`), the last hidden state (`<name>/output`), and the gradients of the sum of that
state's product with fixed numbers (`<name>/gradient/<tensor>`).  All is computed in 64 bits; what is given,
not computed, needs only 32 of them.  The versions are in the file's metadata.
"""

from importlib.metadata import version
from pathlib import Path

import adapters
import torch
from adapters import (
    AdapterFusionConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoubleSeqBnConfig,
    Fuse,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

FILE = Path(__file__).with_name("adapters.safetensors")
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
IDS = dict(vocab_size=40, max_position_embeddings=12, type_vocab_size=1, pad_token_id=0)
DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

CONFIGURATIONS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=8, non_linearity="swish"),
    "pfeiffer": SeqBnConfig(reduction_factor=8),
    "pfeiffer-plain": SeqBnConfig(reduction_factor=8, original_ln_before=False),
    "parallel": ParBnConfig(reduction_factor=8, scaling=4.0),
    "parallel-learned": ParBnConfig(reduction_factor=8, scaling="learned"),
    "fusion": SeqBnConfig(reduction_factor=8),
    "prefix": PrefixTuningConfig(flat=True, prefix_length=5, dropout=0.0),
    "prefix-mlp": PrefixTuningConfig(prefix_length=5, bottleneck_size=7, dropout=0.0),
    "mam": MAMConfig(
        PrefixTuningConfig(flat=True, prefix_length=5, dropout=0.0),
        ParBnConfig(reduction_factor=8, scaling=4.0),
    ),
    "compacter": CompacterConfig(reduction_factor=8, phm_dim=4),
    "compacter++": CompacterPlusPlusConfig(reduction_factor=8, phm_dim=2),
    "compacter++-plain": CompacterPlusPlusConfig(reduction_factor=8, phm_dim=2, original_ln_before=False),
    "unipelt": UniPELTConfig(
        PrefixTuningConfig(flat=True, prefix_length=5, dropout=0.0),
        SeqBnConfig(reduction_factor=8, original_ln_before=False),
        LoRAConfig(r=4, alpha=2),
    ),
}


def random_numbers(generator, shape, scale):
    return scale * torch.randn(shape, generator=generator)


def main():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    weights = random_numbers(generator, (3, 9, 32), 1.0) * mask.unsqueeze(-1)
    tensors = {"input_ids": ids, "attention_mask": mask, "weights": weights}

    for name, configuration in CONFIGURATIONS.items():
        model = BertModel(BertConfig(**SIZE, **IDS, **DROPOUT), add_pooling_layer=False).double().eval()
        state = model.state_dict()
        if not any(key.startswith("base/") for key in tensors):
            for key, tensor in state.items():
                around = 1.0 if key.endswith("LayerNorm.weight") else 0.0
                tensors[f"base/{key}"] = around + random_numbers(generator, tensor.shape, 0.2)
        model.load_state_dict({key: tensors[f"base/{key}"] for key in state})

        adapters.init(model)
        names = ("one", "two") if name.startswith("fusion") else ("one",)
        for adapter in names:
            model.add_adapter(adapter, config=configuration)
        if len(names) > 1:
            model.add_adapter_fusion(
                list(names), config=AdapterFusionConfig.load("dynamic", dropout_prob=0.0)
            )
            model.train_adapter_fusion(Fuse(*names))
        else:
            model.train_adapter("one")
        model.double().eval()
        kinds = {"prefix": "control_trans wte", "compacter": "adapter phm_rule"}
        kinds["mam"] = "control_trans adapter"
        kinds["unipelt"] = "control_trans adapter lora gate"
        kind = kinds.get(name.split("-")[0].strip("+"), "adapter")
        parameters = dict(model.named_parameters())
        added = {key: p for key, p in parameters.items() if any(word in key for word in kind.split())}
        with torch.no_grad():
            for parameter in added.values():
                parameter.copy_(random_numbers(generator, parameter.shape, 0.3))
        # its gates are means over all places, padding included, which guidelib leaves out: so none is padded
        seen = torch.ones_like(mask) if name == "unipelt" else mask
        output = model(input_ids=ids, attention_mask=seen).last_hidden_state
        (output * weights.double()).sum().backward()
        tensors[f"{name}/output"] = output.detach()
        for key, parameter in added.items():
            tensors[f"{name}/value/{key}"] = parameter.detach().float()
            if parameter.grad is not None:
                tensors[f"{name}/gradient/{key}"] = parameter.grad.clone()

    packages = {package: version(package) for package in ("adapters", "transformers", "torch", "safetensors")}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, FILE, packages)
    print(f"{FILE}: {len(tensors)} tensors, {FILE.stat().st_size:,} bytes, {packages}")


if __name__ == "__main__":
    main()
