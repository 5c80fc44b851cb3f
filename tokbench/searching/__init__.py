"""Schedules searched for a model, a method and a budget: what `tokbench search` does."""
