"""Adapters for trainers: each in one file, which alone imports its trainer."""
