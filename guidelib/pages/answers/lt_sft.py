"""The exercises of notebooks/selective/lt_sft.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import difference, draw
from guidelib.pages.exercises import exercise


@exercise(
    hint="One step of SGD moves each entry by the rate times the gradient of the batch, which is the mean "
    "over its examples. What does FishMask average, and what does it do before that?",
    inputs=[(*draw((6, 20)), k) for k in (1, 5)],
)
def supports(gradients, k):
    """The ticket after one step of SGD, and FishMask's choice, from gradients of single examples, (N, D)."""
    scores = gradients.sum(0).abs(), gradients.norm(dim=0)
    return [score.argsort(descending=True)[:k].sort().values for score in scores]


def _pair(first, second):
    places = [torch.tensor(each) for each in (first, second)]
    values = draw(*((len(each),) for each in places))
    return places[0], values[0], places[1], values[1]


@exercise(
    hint="An entry that both move stands once in the sum. torch.unique says which places there are, and with "
    "return_inverse=True where each of the old ones has gone.",
    inputs=[_pair([0, 3, 7], [1, 3, 8]), _pair([4], [0, 2]), _pair([1, 2], [1, 2])],
    tolerance=1e-6,
)
def add(i, u, j, v):
    """The places, ascending, and the values of the sum of two sparse differences."""
    total: dict[int, torch.Tensor] = {}
    for place, value in zip(torch.cat((i, j)).tolist(), torch.cat((u, v)), strict=True):
        total[place] = total.get(place, 0) + value
    places = sorted(total)
    return [torch.tensor(places), torch.stack([total[place] for place in places])]


@exercise(
    hint="Gradients and optimiser are full fine-tuning's. What does phase 1 hold beside the base: a number "
    "for each entry, and the ticket that is to be filled? And what does autograd keep of a norm whose gain "
    "is no parameter any more?"
)
def dense():
    """Measured: by how many bytes a step of phase 1 is larger than one of full fine-tuning."""

    def total(model):
        peft = gl.attached(model)
        peft.method.prepare(peft, [])
        return gl.measure(model, gl.token_batch(model, 8, 32)).memory.total

    return difference(total, gl.FullFineTuning(), gl.LTSFT())
