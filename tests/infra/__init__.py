"""Tests of what outlives a run."""
