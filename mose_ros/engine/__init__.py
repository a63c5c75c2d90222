"""Runs an exported bundle: sessions, view router, driver, policy. Never sees torch."""
