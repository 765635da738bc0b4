"""Adaptations in the file formats of others."""
