"""Latency and memory of a hybrid beside its teacher, measured here."""
