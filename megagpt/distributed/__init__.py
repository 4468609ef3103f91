"""Ranks: process group, collectives, rendezvous, launchers and hostfiles."""
