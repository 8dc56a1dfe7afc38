"""Additive methods that are neither adapters nor soft prompts."""
