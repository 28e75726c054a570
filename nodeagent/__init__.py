"""The part of Millrace that obeys and observes: one process a machine, running engines."""
