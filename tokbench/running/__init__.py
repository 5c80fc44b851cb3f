"""`tokbench run`: measures the models of a grid into a run folder, and continues interrupted runs."""
