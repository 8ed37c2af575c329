"""Hosts: doors of pyrl in other trainers. Each file is the adapter of one of them; importing this
folder imports none."""
