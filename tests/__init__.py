"""Tests, in the folders of what they test; `promises` holds those that span several. See README.md."""
