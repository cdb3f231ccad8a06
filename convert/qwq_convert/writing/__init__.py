"""Planned files in, whole files out, whatever interrupts the writing."""
