"""Measuring programs. README.md describes each table and how it was measured."""
