"""Engines: what trains the model, alone or with others; one file an engine, one interface."""
