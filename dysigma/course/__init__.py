"""The course: what its notebooks call, and the builder that executes them."""
