"""An engine look-alike: vLLM's HTTP and metrics without a model, as a program of its own."""
