"""Two runs held against each other: whether one still says what the other said, or how they differ."""
