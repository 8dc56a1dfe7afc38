"""Adapters: small networks between the sub-layers of a frozen transformer (survey, section 6)."""
