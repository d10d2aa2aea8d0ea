"""What the measurements on a GPU have in common."""
