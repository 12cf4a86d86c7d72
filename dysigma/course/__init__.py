"""What the notebooks need: predictions and exercises, and the builder that executes the pages."""
