"""Cleaning and quality rules for documents."""
