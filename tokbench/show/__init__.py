"""Pictures of what methods make of an image's patches."""
