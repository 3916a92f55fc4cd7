"""Subspaces, overlap and its nulls."""
