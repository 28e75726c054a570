"""What a machine has: CPU share, NVIDIA GPUs, or a fixed list for tests."""
