"""Import from and export to Hugging Face folders. Other packages use `convert` (import) and `export`."""
