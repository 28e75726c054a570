"""Goes on with a stream on another engine when its own dies."""
