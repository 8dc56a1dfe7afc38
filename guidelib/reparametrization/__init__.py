"""Reparametrisation-based methods: train few numbers that span a large update (survey, section 3.3)."""
