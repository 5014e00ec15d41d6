"""The simulation itself as a runtime: a target, without a writer of files."""
