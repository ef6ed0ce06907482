"""Partition strategies shipped with factorctl, one file each. A plugin imports only `factorctl.contracts`."""
