"""Readers of vision towers, one file for each family of models."""
