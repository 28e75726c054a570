"""How an engine is run: as a process of this machine."""
