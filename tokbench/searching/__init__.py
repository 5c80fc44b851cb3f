"""Searching a schedule for a model, a method and a budget: `tokbench search`."""
