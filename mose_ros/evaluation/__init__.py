"""Judges any policy: closed loop, open loop, language. Torch-free."""
