"""Additive methods that give the model something to attend to: prompts and prefixes."""
