"""Algorithms that find copies, near copies and contaminated documents."""
