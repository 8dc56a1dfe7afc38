"""Additive methods: new parameters beside the frozen model (survey, section 3.1)."""
