"""Keeps agents and the control plane in step: sessions, assignments, reports, silent nodes."""
