"""The exercises of notebooks/template.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(hint="A stays as it was drawn, and B has r columns.")
def count():
    model, _ = gl.load_backbone("minilm")
    peft = gl.attach(model, gl.LoRA(r=16, freeze_A=True))
    return peft.parts[0].delta.B.numel()


@exercise(
    hint="X A^T is all that B sees: it is an ordinary least-squares problem.",
    inputs=[
        tuple(
            torch.randn(s, generator=torch.Generator().manual_seed(s[0])) for s in ((2, 8), (64, 8), (64, 4))
        )
    ],
    tolerance=1e-4,
)
def best_B(A, X, Y):
    return Y.T @ torch.linalg.pinv(X @ A.T).T
