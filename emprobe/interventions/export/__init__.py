"""Interventions as files and requests that other programs carry out."""
