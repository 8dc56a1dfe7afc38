"""What pages show of costs and of results: the numbers are those of the library, told in one way."""

import re

import numpy as np
import pytest
import torch

import guidelib as gl
from guidelib.pages import prices

METHODS = {
    "full": gl.FullFineTuning(),
    "head": gl.HeadOnly(),
    "LoRA": gl.LoRA(r=2),
    "adapter": gl.PfeifferAdapter(r=4),
}


@pytest.fixture(scope="module")
def found():
    return gl.cost_table(METHODS, backbone="tiny-bert", batches=(2, 5), length=7)


def cells(output):
    """The rows of a table as text, split where the columns are."""
    return {
        line[0]: line[1:]
        for line in (re.split(r"\s{2,}", line.strip()) for line in repr(output).splitlines())
    }


def test_the_prices_are_what_is_measured(found):
    for label, method in METHODS.items():
        model, _ = gl.load_backbone("tiny-bert", task="movie-reviews")
        peft = gl.attach(model, method)
        for size, memory in zip((2, 5), found[label].memory, strict=True):
            cost = gl.measure(model, prices.token_batch(model, size, 7))
            assert memory["saved activations"] == cost.saved_bytes
            trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            assert (memory["gradients"], memory["optimiser"]) == (trained, 2 * trained)
            assert memory["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert found[label].count == peft.count() and found[label].file_bytes == cost.file_bytes
        assert found[label].totals == tuple(sum(memory.values()) for memory in found[label].memory)
    assert found.full == "full" and found.exact and found["LoRA"].exact


def test_merged_models_have_the_base_s_operations(found):
    assert found["LoRA"].merged == found["LoRA"].base < found["LoRA"].operations
    assert found["adapter"].merged is None and found["head"].operations == found["head"].base


def test_the_table_says_them(found):
    rows = cells(found)
    assert rows["trained"] == [f"{found[label].count.trainable:,}" for label in METHODS]
    share = found["LoRA"].totals[1] / found["full"].totals[1]
    assert rows["total, batch 5"][2].endswith(f"({share:.2f})")
    assert rows["operations"][2] == str(found["LoRA"].operations)
    assert rows["once merged"] == ["–", "–", str(found["LoRA"].base), "–"]
    many = gl.cost_table(
        {str(r): gl.LoRA(r=r) for r in range(1, 7)}, backbone="tiny-bert", batches=(1,), length=3
    )
    assert list(cells(many))[-6:] == [str(r) for r in range(1, 7)]  # a method a row, where there are many
    assert many.full is None and "(" not in repr(many).split("\n", 3)[-1]


def test_the_survey_s_rows_stand_beside(found):
    rows = cells(gl.survey_table("LoRA", found, "LoRA", "adapter"))
    assert rows["memory efficient"][:2] == ["yes", "yes"]
    shares = [a / b for a, b in zip(found["LoRA"].totals, found["full"].totals, strict=True)]
    assert rows["memory efficient"][2] == f"yes: {shares[0]:.2f} and {shares[1]:.2f} of full"
    assert rows["storage efficient"][2].startswith("yes: ")
    assert rows["overhead at inference"][2].endswith("+0 once merged")
    assert "merged" not in rows["overhead at inference"][3]
    assert cells(gl.survey_table("DiffPruning", found, "full"))["memory efficient"][2].startswith("no: 1.00")
    later = cells(gl.survey_table("DoRA", found, "LoRA"))  # the first version does not have it
    assert later["memory efficient"][:2] == ["–", "yes"] and later["trained, %"][:2] == ["–", "–"]
    with pytest.raises(ValueError, match="method must be one of Adapters, .*, got 'AdaLoRA'"):
        gl.survey_table("AdaLoRA", found, "LoRA")


def test_prices_refuse(found):
    with pytest.raises(ValueError, match="methods must be a mapping of labels"):
        gl.cost_table({})
    with pytest.raises(ValueError, match="batches, length must be whole numbers"):
        gl.cost_table(METHODS, batches=(0,))
    with pytest.raises(ValueError, match="label must be one of full, head, LoRA, adapter, got 'LORA'"):
        found["LORA"]
    with pytest.raises(ValueError, match="labels must be one or more of"):
        gl.survey_table("LoRA", found)
    alone = gl.cost_table({"LoRA": gl.LoRA(r=1)}, backbone="tiny-bert", batches=(1,), length=3)
    with pytest.raises(ValueError, match="found must be a cost table with full fine-tuning"):
        gl.survey_table("LoRA", alone, "LoRA")


def test_what_is_counted_is_a_configuration():
    with pytest.raises(ValueError, match="config must be a transformers configuration .*, got 'minilm'"):
        gl.count("minilm", gl.LoRA())


def test_latency_is_printed_in_a_live_notebook_only(capsys, monkeypatch):
    for live, lines in (("0", 0), ("1", 1)):
        monkeypatch.setenv("GUIDELIB_LIVE", live)
        gl.cost_table({"LoRA": gl.LoRA(r=1)}, backbone="tiny-bert", batches=(1,), length=3)
        assert capsys.readouterr().out.count("times as long") == lines


def test_other_kinds_of_backbone_are_priced():
    for backbone in ("tiny-gpt2", "tiny-t5-random"):
        table = gl.cost_table({"LoRA": gl.LoRA(r=2)}, backbone=backbone, task=None, batches=(2,), length=5)
        assert all(value > 0 for value in table["LoRA"].memory[0].values())


def result(differences):
    """Three seeds of a reference and of methods that differ from it by so much."""
    runs = []
    for method, gaps in {"LoRA": (0, 0, 0), **differences}.items():
        for lr in (1, 2, 3):
            for seed, gap in enumerate(gaps):
                score = 0.8 + (gap + seed) / 100 - 0.2 * (lr != 2)
                scores = {"validation": {"accuracy": score, "loss": 1.0}, "test": {"accuracy": score}}
                runs.append({"task": "reviews", "method": method, "lr": lr, "seed": seed} | scores)
    methods = dict.fromkeys(("LoRA", *differences))
    settings = {"tasks": {"reviews": {}}, "methods": methods, "seeds": 3, "tuning_seeds": 1}
    return {"settings": settings, "runs": runs}


def test_a_finding_says_every_verdict():
    differences = {"up": (3, 3.1, 3), "same": (0, 0.1, 0), "down": (-2, -2.1, -2), "who knows": (3, -2, 1)}
    finding = gl.finding(result(differences), "LoRA")
    kinds = {"up": "above", "same": "equal", "down": "below", "who knows": "open", "LoRA": "none"}
    assert {label: finding[label].verdict for label in kinds} == kinds
    mean = np.mean(differences["up"])
    assert finding["up"].difference == pytest.approx(mean)
    assert finding.text.startswith("Against LoRA. Above: up. Equal within 1 point: same.")
    assert [finding.text.index(name) for name in ("up", "same", "who knows", "down")] == sorted(
        finding.text.index(name) for name in differences
    )
    assert finding.text in repr(finding) and finding.text.count("LoRA") == 1
    with pytest.raises(ValueError, match="label must be one of"):
        finding["sideways"]


def test_a_finding_shows_another_task_beside():
    both, other = result({"up": (3, 3.1, 3)}), result({"up": (0, 0.1, 0)})
    both["settings"]["tasks"]["songs"] = {}
    both["runs"] += [run | {"task": "songs"} for run in other["runs"]]
    finding = gl.finding(both, "LoRA", also="songs")
    assert (finding["up"].verdict, finding.also["up"].verdict) == ("above", "equal")
    table = repr(finding)
    assert "on songs" in table and "0.0 equal" in table and "and on songs." in finding.bundle["text/html"]
    assert "songs" not in repr(gl.finding(both, "LoRA")) and gl.finding(both, "LoRA").also == {}
    with pytest.raises(ValueError, match="task must be"):
        gl.finding(both, "LoRA", also="dances")


def test_a_caption_speaks_of_the_edge_only_where_a_rate_is_at_it():
    inside, edged = result({"up": (3, 3.1, 3)}), result({"up": (3, 3.1, 3)})
    edged["runs"] = [run for run in edged["runs"] if (run["method"], run["lr"]) != ("up", 3)]
    captions = [gl.finding(each, "LoRA").bundle["text/html"] for each in (inside, edged)]
    assert ["at the edge" in caption for caption in captions] == [False, True]


def test_a_recording_looks_after_each_step():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with gl.recording(lambda: float(weight)) as seen:
        for _ in range(3):
            weight.grad = torch.tensor(-1.0)
            optimizer.step()
    optimizer.step()
    assert seen == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError), gl.recording(lambda: float(weight)) as seen:
        raise ZeroDivisionError
    optimizer.step()
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gl.place(gl.LoRA), "method must be a method such as LoRA"),
        (lambda: gl.cost_table(gl.LoRA()), "methods must be a mapping of labels to methods"),
        (lambda: gl.cost_table({"a": gl.LoRA()}, batches=8), "batches, length must be whole numbers"),
        (
            lambda: gl.cost_table({"a": gl.LoRA()}, backbone="tiny-bert", length=400),
            "length must be at most 256",
        ),
        (lambda: gl.finding("minilm", "LoRA"), "result must be a stored result"),
        (
            lambda: gl.Diagram(9, 9, alt="A line, and no more.", caption="A line.").line((0, 0), kind="x"),
            "kind must be one of",
        ),
    ],
)
def test_a_wrong_kind_of_argument_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
