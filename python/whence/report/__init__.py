"""Scores as text, tables and pages."""
