"""Which engine holds which prefix: canonical prompts, hash chains, the approximate index, rendezvous."""
