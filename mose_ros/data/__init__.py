"""Recorded driving: the clip format, its readers, and the rules that label skills, cameras and reasoning."""
