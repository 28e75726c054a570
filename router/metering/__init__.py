"""Counts what requests used, to the token: what is asked of engines, read from answers, handed to a sink."""
