"""A model with its method as a file that other runtimes read."""

from tokbench.exporting.export import Exported, export
