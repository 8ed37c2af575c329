"""Hosts: adapters for other trainers, one file each. Importing pyrl imports none of them."""
