"""Selective methods: train a part of the model's own parameters (survey, section 3.2)."""
