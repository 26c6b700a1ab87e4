"""Runs that differ in one thing: how they are trained together, compared and tabulated."""
