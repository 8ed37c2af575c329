"""Serve: a server of the Tinker protocol, whose clients train and sample on this machine."""
