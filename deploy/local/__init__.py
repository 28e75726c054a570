"""What `make up` runs: a whole Millrace on one machine, in the foreground."""
