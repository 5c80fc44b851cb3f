"""What a model costs and what it gets right: FLOPs, accuracy, speed, and the statistics around them.

Each module here works alone, on any `nn.Module`; none knows about methods, grids or run folders.
"""
