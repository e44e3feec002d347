"""Attention over packs of preference pairs, with one module per device."""
