"""How ``tiny-t5`` was pretrained: its text, its tokenizer, its training.  ``guidelib pretrain`` runs it.

Nothing here is needed to use the model.
"""
