"""What would be trained, on what, and how: printed before anything is."""
