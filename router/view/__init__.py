"""What the router knows of the cluster: an immutable view, and its feed from the store."""
