"""Builds the router with its hot path compiled, for those who have a C compiler and want the speed."""
