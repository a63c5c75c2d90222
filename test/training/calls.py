"""A function that other processes can find by its name."""

import os


def divide(number: int, by: int) -> tuple[int, int, int]:
    """Return the number, what it is divided by another, and the process that said so."""
    return number, number // by, os.getpid()
