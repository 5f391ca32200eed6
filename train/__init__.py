"""The loop, its objectives and engines, and what is read off a run."""
