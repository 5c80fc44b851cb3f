"""Measurements of any `nn.Module`: FLOPs, accuracy, speed, and their statistics.

The modules know nothing about methods, grids or run folders.
"""
