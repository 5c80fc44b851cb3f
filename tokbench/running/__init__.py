"""What `tokbench run` does: a grid goes into a folder, a model is measured, what was measured is kept and continued."""
