"""Hybrids: expressions of the methods of the other classes."""
