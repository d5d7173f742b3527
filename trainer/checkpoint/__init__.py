"""State of a run in global names and offsets: written by all ranks, committed by a marker, read back at any tp and dp."""
