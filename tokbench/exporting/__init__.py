"""A model with its method as a file that other runtimes read."""

from tokbench.exporting.writing import Exported, export
