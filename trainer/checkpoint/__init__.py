"""Checkpoints: state saved under global names and offsets, committed by a marker, readable at any tp and dp."""
