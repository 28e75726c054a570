"""Engine adapters: what differs between engines, behind one small protocol.

An adapter knows how its engine is installed, started and measured. It starts nothing and talks to no
one: processes belong to `nodeagent.runtimes`, HTTP to `nodeagent.health`. The sub-package `simulator` is
a program of its own and imports nothing from here.
"""
