"""Figures, and the reports that show them."""
