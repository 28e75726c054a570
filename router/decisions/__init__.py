"""Why this engine: what each choice was made from, kept for a while, shown when asked."""
